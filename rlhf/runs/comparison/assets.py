"""What the page has besides the report's style: its own, and the script of the axis and of the sample browser."""

from __future__ import annotations

STYLE = """
h1{margin-bottom:.3em}
.notes{margin:14px 0;padding:10px 14px 10px 30px;background:var(--card);border:1px solid var(--rule);
border-left:4px solid var(--warn);border-radius:10px}.notes li{margin:3px 0}
.methods{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;margin:.6em 0;padding:0;font-size:.92rem}
.swatch{display:inline-block;width:14px;height:14px;border-radius:4px;margin-right:7px;vertical-align:-2px;flex:none}
.method{overflow-wrap:break-word}th.method,td.method{min-width:9em}
caption{caption-side:top;text-align:left;color:var(--dim);padding:8px 14px;font-size:.86rem;position:sticky;left:0;
max-width:calc(100vw - 44px)}
tbody th[scope=row]{position:sticky;left:0;background:var(--card)}section>.tablebox{margin-bottom:12px}
section>.figures{margin:12px 0}
.named{display:flex;align-items:baseline}
tbody th{font-weight:500;color:inherit}
.figures .plot{padding:6px}.plot svg text{font-size:12px}.plot .tick{font-size:11px}
.plot .panel{fill:var(--text);font-weight:600}.plot .band{opacity:.17;stroke:none}
.matrix td,.matrix th.method[scope=col]{text-align:center;font-variant-numeric:tabular-nums}
.matrix .self{color:var(--dim)}
.strong{font-weight:650}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,260px),1fr));gap:8px 18px;margin-top:8px}
.answer{border-left:4px solid var(--s2);padding-left:10px;min-width:0}.answer .text{margin:2px 0 6px}
.pager{display:flex;gap:10px;align-items:center;margin:10px 0}
button{font:inherit;color:inherit;background:var(--card);border:1px solid var(--rule);
border-radius:8px;padding:6px 12px}
button:disabled{opacity:.45}button,select,input{min-height:36px}
:focus-visible{outline:2px solid var(--s0);outline-offset:2px}
@media (max-width:640px){.tools label{flex:1 1 100%}.tools select{width:100%}caption{padding:8px 9px}
th.method,td.method{min-width:8em;max-width:11em}
.tablebox table{font-size:.86rem}}
"""

SCRIPT = """
(function(){
var axis=document.getElementById('axis');
if(axis){
document.getElementById('axis-tools').hidden=false;
var showAxis=function(){
document.querySelectorAll('[data-axis]').forEach(function(part){
var own=part.parentNode.querySelector('[data-axis="'+axis.value+'"]');
part.hidden=part.dataset.axis!==(own?axis.value:'step');
});
};
axis.addEventListener('change',showAxis);showAxis();
}
var data=document.getElementById('samples-data'),list=document.getElementById('samples-list');
if(!data||!list)return;
var body=JSON.parse(data.textContent),rows=body.rows,page=0,size=10,found=[],
id=function(name){return document.getElementById(name)},
filter=id('samples-filter'),order=id('samples-order'),seed=id('samples-seed'),
colors=list.dataset.colors.split(',');
id('samples-tools').hidden=false;id('samples-pager').hidden=false;
rows.forEach(function(row){
row.words=row.prompt.map(function(turn){return turn[1]}).concat([].concat.apply([],row.responses.map(function(own){
return own.map(function(one){return one?one.text:''})}))).join(' ').toLowerCase();
});
function make(kind,name,text){
var part=document.createElement(kind);
if(name)part.className=name;
if(text!==undefined)part.textContent=text;
return part;
}
function lead(row,method){
var own=row.means[method],rest=row.means.filter(function(mean,index){return index!==method&&mean!==null});
if(own===null||!rest.length)return -Infinity;
return own-rest.reduce(function(sum,mean){return sum+mean},0)/rest.length;
}
function number(name,value){return name+' '+String(Math.round(value*1000)/1000)}
function answer(one,index){
var part=make('div','answer'),who=make('div','who');
part.style.borderColor=colors[index%colors.length];
var seeds=body.seeds[index],responses=one.responses[index];
who.appendChild(make('b','method',body.methods[index]));
part.appendChild(who);
responses.forEach(function(response,place){
if(seed.value!=='all'&&String(seeds[place])!==seed.value)return;
if(!response)return;
var facts=[];
if(seeds[place]!==null)facts.push('seed '+seeds[place]);
if(response.score!==undefined)facts.push(number('score',response.score));
if(response.reward_model_score!==undefined)facts.push(number('reward model',response.reward_model_score));
if(response.length!==undefined)facts.push(number('tokens',response.length));
if(response.kl!==undefined)facts.push(number('KL',response.kl));
part.appendChild(make('div','who',facts.join(' · ')));
part.appendChild(make('div','text',response.text));
});
return part;
}
function item(row){
var part=make('article','sample'),prompt=make('div','prompt');
row.prompt.forEach(function(turn){
var line=make('div','text');
if(turn[0])line.appendChild(make('span','role',turn[0]));
line.appendChild(document.createTextNode(turn[1]));
prompt.appendChild(line);
});
part.appendChild(prompt);
var answers=make('div','answers');
body.methods.forEach(function(name,index){answers.appendChild(answer(row,index))});
part.appendChild(answers);
return part;
}
function draw(){
var last=Math.max(0,Math.ceil(found.length/size)-1);
page=Math.min(page,last);
list.textContent='';
found.slice(page*size,page*size+size).forEach(function(row){list.appendChild(item(row))});
if(!found.length)list.appendChild(make('p','empty card','No prompt has these words.'));
id('samples-count').textContent=found.length+' of '+rows.length+' prompts';
id('samples-page').textContent='Page '+(page+1)+' of '+(last+1);
id('samples-back').disabled=page===0;id('samples-next').disabled=page===last;
}
function search(){
var words=filter.value.toLowerCase().split(/\\s+/).filter(Boolean),kind=order.value;
found=rows.filter(function(row){return words.every(function(word){return row.words.indexOf(word)>=0})});
if(kind==='gap')found.sort(function(a,b){return (b.gap===null?-1:b.gap)-(a.gap===null?-1:a.gap)||a.n-b.n});
else if(kind!=='given'){
var method=Number(kind.slice(5)),sign=kind.slice(0,5)==='best-'?1:-1;
found.sort(function(a,b){
var x=lead(a,method),y=lead(b,method);
if(x===y)return a.n-b.n;
if(x===-Infinity)return 1;
if(y===-Infinity)return -1;
return sign*(y-x);
});
}
page=0;draw();
}
filter.addEventListener('input',search);order.addEventListener('change',search);seed.addEventListener('change',draw);
id('samples-back').addEventListener('click',function(){page-=1;draw()});
id('samples-next').addEventListener('click',function(){page+=1;draw()});
search();
})();
"""
