"""The LLM's chat template with a branch for images: text turns render exactly as the LLM's do.

LLM templates take a message's content as text. In front of the unchanged template stands a block
that turns content given as parts into that text, images as the shell writes them.
"""

from __future__ import annotations

from vlmcore.surgery.shells import Shell

# `is string` first: a string is a sequence too; content may be missing beside tool calls.
# The last line prints nothing, and keeps `trim_blocks` from eating a line break of what follows.
_FLATTEN = """\
{%- set flat = namespace(messages=[], text='') -%}
{%- for message in messages -%}
{%- if message.content is not defined or message.content is none or message.content is string -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- else -%}
{%- set flat.text = '' -%}
{%- for part in message.content -%}
{%- if part.type in ('image', 'image_url') -%}
{%- set flat.text = flat.text + IMAGE -%}
VIDEO_BRANCH{%- else -%}
{%- set flat.text = flat.text + part.text -%}
{%- endif -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [dict(message, content=flat.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
{{- '' }}"""
_VIDEO_BRANCH = """\
{%- elif part.type in ('video', 'video_url') -%}
{%- set flat.text = flat.text + VIDEO -%}
"""


def with_images(template: str, shell: Shell) -> str:
    """`template`, for messages whose content is a string or a list of parts."""
    video = "" if shell.video is None else _VIDEO_BRANCH.replace("VIDEO", _literal(shell.video))
    head = _FLATTEN.replace("VIDEO_BRANCH", video).replace("IMAGE", _literal(shell.image))
    return head + template


def _literal(text: str) -> str:
    return "'" + text.replace("\n", "\\n") + "'"
