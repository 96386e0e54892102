"""The report's style sheet and its only script: a filter and an order for the samples. It can do without both."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfd;--card:#fff;--text:#1b1f27;--dim:#5d6675;--rule:#e1e4ea;--grid:#eceef3;
--s0:#2457d6;--s1:#c2570c;--s2:#7c8798;--good:#18794e;--bad:#b4232c;--warn:#946200;--chip:#eef1f7}
@media (prefers-color-scheme:dark){:root{--bg:#11141a;--card:#191d25;--text:#e6e9ef;--dim:#98a2b3;--rule:#2b313c;
--grid:#252b35;--s0:#7fa4ff;--s1:#f2a65e;--s2:#8e99aa;--good:#5fd39a;--bad:#ff8a8a;--warn:#e5b94e;--chip:#232935}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:20px 16px 64px}
h1{font-size:1.7rem;line-height:1.2;margin:.2em 0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.2em 0 .7em;padding-bottom:.3em;border-bottom:1px solid var(--rule)}
h3{font-size:1rem;margin:1.5em 0 .6em}
p{margin:.4em 0}.dim{color:var(--dim)}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin-top:.8em;font-size:.92rem}
a{color:var(--s0);text-decoration:none}a:hover{text-decoration:underline}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.86em}
pre{margin:0;padding:14px;overflow:auto;max-height:70vh}
.meta{display:flex;flex-wrap:wrap;gap:2px 18px;color:var(--dim);font-size:.92rem}
.chip{display:inline-block;padding:1px 9px;border-radius:99px;background:var(--chip);font-size:.82rem;
white-space:nowrap}
.finished,.good{color:var(--good)}.failed,.killed,.bad{color:var(--bad)}.interrupted,.running{color:var(--warn)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,200px),1fr));gap:12px}
.card,figure,details,.tablebox,.sample{background:var(--card);border:1px solid var(--rule);border-radius:10px}
.card{padding:12px 16px}.card .name{color:var(--dim);font-size:.88rem}
.card .number{font-size:1.75rem;font-weight:650;line-height:1.25;font-variant-numeric:tabular-nums}
.card .more{color:var(--dim);font-size:.86rem;font-variant-numeric:tabular-nums}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:12px}
figure{margin:0;padding:10px 10px 6px;break-inside:avoid}
figcaption{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 12px;
font-weight:600;font-size:.9rem;padding:0 4px 4px}
.legend{display:flex;gap:12px;font-weight:400;color:var(--dim);font-size:.82rem}
.key::before{content:"";display:inline-block;width:14px;height:3px;border-radius:2px;margin-right:5px;
vertical-align:middle}
.key.s0::before{background:var(--s0)}.key.s1::before{background:var(--s1)}.key.s2::before{background:var(--s2)}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--dim);font:11px system-ui,sans-serif}svg .tick{font-variant-numeric:tabular-nums}
svg .note{fill:var(--text)}
.grid{stroke:var(--grid)}.axis{stroke:var(--dim);stroke-opacity:.55}.mark{stroke:var(--dim);stroke-dasharray:3 3}
.line{fill:none;stroke-width:1.7;stroke-linejoin:round;stroke-linecap:round}.path{stroke-opacity:.35;stroke-width:1.2}
.line.s0,.bar.s0{stroke:var(--s0)}.line.s1,.bar.s1{stroke:var(--s1)}.line.s2,.bar.s2{stroke:var(--s2)}
.bar{stroke-width:3;stroke-linecap:round}
.dot.s0,.hit.s0{fill:var(--s0)}.dot.s1,.hit.s1{fill:var(--s1)}.dot.s2,.hit.s2{fill:var(--s2)}
.hit{opacity:0}.hit:hover{opacity:1}
.interval{width:100%;min-width:170px;max-width:300px}.interval text{font-size:9.5px}
.study{overflow-x:auto;margin:0 0 12px}.study svg{min-width:640px;max-width:100%}.study .band{opacity:.18;stroke:none}
.study .title,.study .panel{fill:var(--text);font-weight:600}
.tablebox{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{padding:8px 14px;text-align:left;vertical-align:middle;border-top:1px solid var(--rule)}
thead th{border-top:0;color:var(--dim);font-weight:600;font-size:.82rem;white-space:nowrap}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td .range{display:block;color:var(--dim);font-size:.84em}
details{margin:10px 0;overflow:hidden}summary{cursor:pointer;padding:9px 14px;font-weight:600;font-size:.92rem}
details[open]>summary{border-bottom:1px solid var(--rule)}details .figures{padding:12px}details .tablebox{border:0}
details tr:first-child>td{border-top:0}
.tools{display:flex;flex-wrap:wrap;gap:8px 12px;margin:0 0 10px;align-items:center;font-size:.92rem}
.tools input,.tools select{font:inherit;color:inherit;background:var(--card);
border:1px solid var(--rule);border-radius:8px;padding:6px 10px}
.tools input{flex:1 1 200px;max-width:340px}
.sample{margin:0 0 10px;padding:10px 14px;break-inside:avoid}
.prompt{color:var(--dim)}.text{white-space:pre-wrap;overflow-wrap:anywhere}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:8px 18px;margin-top:6px}
.side{border-left:3px solid var(--s2);padding-left:10px}.side.after{border-color:var(--s0)}
.who{display:flex;gap:8px;align-items:baseline;color:var(--dim);font-size:.82rem}
.empty{padding:14px;color:var(--dim)}
.role{color:var(--dim);font-size:.82rem;margin-right:6px}
[hidden]{display:none!important}
@media (max-width:640px){main{padding:12px 10px 48px}
.pair{grid-template-columns:1fr}th,td{padding:7px 9px}h1{font-size:1.4rem}
.evaluation tr{display:grid;grid-template-columns:1fr 8.2em 8.2em;border-top:1px solid var(--rule)}
.evaluation thead tr,.evaluation td,.evaluation th{border:0}
.evaluation :is(td,th):last-child{grid-column:1/-1;padding-top:0}}
@media print{:root{--bg:#fff}body{font-size:11px}main{max-width:none;padding:0}nav,.tools{display:none}
.figures{grid-template-columns:repeat(3,1fr)}.card,figure,.sample,tr{break-inside:avoid}
pre{max-height:none;white-space:pre-wrap}}
"""

SCRIPT = """
(function(){
var list=document.getElementById('samples-list'),tools=document.getElementById('samples-tools');
if(!list||!tools)return;
tools.hidden=false;
var filter=document.getElementById('samples-filter'),order=document.getElementById('samples-order'),
count=document.getElementById('samples-count'),all=Array.prototype.slice.call(list.children);
function show(){
var words=filter.value.toLowerCase().split(/\\s+/).filter(Boolean),seen=0;
all.forEach(function(item){
var text=item.textContent.toLowerCase();
item.hidden=!words.every(function(word){return text.indexOf(word)>=0});
if(!item.hidden)seen+=1;
});
count.textContent=seen+' of '+all.length;
}
function sort(){
var sign=order.value==='gain'?-1:1,sorted=all.slice();
if(order.value!=='given')sorted.sort(function(a,b){
var x=parseFloat(a.dataset.gain),y=parseFloat(b.dataset.gain);
if(isNaN(x))return isNaN(y)?0:1;
if(isNaN(y))return -1;
return sign*(x-y);
});
sorted.forEach(function(item){list.appendChild(item)});
}
filter.addEventListener('input',show);order.addEventListener('change',sort);show();
})();
"""
