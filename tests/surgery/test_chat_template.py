from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from vlmcore.errors import WeightError
from vlmcore.surgery.chat_template import with_images
from vlmcore.surgery.shells import SHELLS
from vlmcore.surgery.swap import swap_llm

# as LLM templates do: text content only, tool calls without content, the first turn apart
LLM = """\

{%- if messages[0].role == 'system' %}
    {{- '<s>' + messages[0].content + '</s>' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{% for message in messages %}
[{{ message.role }}]{% if message.content is string %}{{ message.content }}{% endif %}
{% if message.tool_calls %}<call>{{ message.tool_calls[0] }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}[assistant]{% endif %}
"""


def rendered(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    (text,), _ = render_jinja_template([messages], chat_template=template, **options)
    return text


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": " Hello \n"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}],
        [
            {"role": "user", "content": "Call it."},
            {"role": "assistant", "content": None, "tool_calls": ["f()"]},
            {"role": "assistant", "tool_calls": ["g()"]},
            {"role": "tool", "content": ""},
        ],
    ],
)
@pytest.mark.parametrize("template", [LLM, LLM[1:], "\n\n" + LLM], ids=["1", "0", "3 line breaks"])
def test_text_turns_render_as_the_llms_template_does(
    template: str, messages: list[dict[str, Any]], prompt: bool
) -> None:
    ours = with_images(template, SHELLS["qwen3_vl"])
    options = {"add_generation_prompt": prompt}
    assert rendered(ours, messages, **options) == rendered(template, messages, **options)


@pytest.mark.parametrize("name", sorted(SHELLS))
def test_parts_become_the_shells_placeholders_in_their_order(name: str) -> None:
    shell = SHELLS[name]
    content = [
        {"type": "text", "text": "Before "},
        {"type": "image"},
        {"type": "image_url"},
        {"type": "text", "text": " after"},
    ]
    text = f"Before {shell.image}{shell.image} after"
    if shell.video is not None:
        content.append({"type": "video"})
        text += shell.video
    found = rendered(with_images(LLM, shell), [{"role": "user", "content": content}])
    assert found == rendered(LLM, [{"role": "user", "content": text}])


def test_an_llm_without_a_template_is_refused(tiny_model, tmp_path) -> None:
    import shutil

    llm = shutil.copytree(tiny_model("qwen3"), tmp_path / "llm")
    (llm / "chat_template.jinja").unlink()
    with pytest.raises(WeightError, match="has no chat template; put the one"):
        swap_llm(tiny_model("qwen3_vl"), llm, tmp_path / "swapped", seed=0)
