"""Chat templates that come with the package, and what `model.chat_template` may be."""

from __future__ import annotations

from pathlib import Path

from rlhf.errors import ConfigError

CHATML = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# The transcript of the Anthropic HH data. The space before the answer belongs to the answer, as in that data.
PLAIN = """\
{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}\
{% elif message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] }}\
{% else %}{{ '\\n\\nAssistant: ' + message['content'] }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"""

BUILT_IN: dict[str, str] = {"chatml": CHATML, "plain": PLAIN}


def chat_template(value: str) -> str:
    """The Jinja text that `model.chat_template` means: a name in `BUILT_IN`, a file's path, or the text itself.

    Raises `ConfigError` for what is none of these.
    """
    if value in BUILT_IN:
        return BUILT_IN[value]
    if "{{" in value or "{%" in value:
        return value
    path = Path(value).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"model.chat_template={value}: expected {', '.join(BUILT_IN)}, the path of a Jinja file, or a Jinja text "
            f"with {{{{ }}}}; there is no file {path.absolute()}"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"model.chat_template={value}: the file is not UTF-8") from error
