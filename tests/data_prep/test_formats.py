"""Each format from a small file of the kind that people have, through to its shards."""

import base64
import http.server
import io
import json
import tarfile
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.formats import RowFormat
from data_prep.samples import RowReader
from data_prep.shards import write_shards
from data_prep.tars import read_tar_samples
from tests.data_prep.conftest import gradient
from vlmcore.errors import DataError


def jpeg(width=40, height=30):
    out = io.BytesIO()
    gradient(width, height).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path):
    raw = tmp_path / "raw"
    (raw / "images").mkdir(parents=True)
    (raw / "images" / "a.jpg").write_bytes(jpeg())
    (raw / "images" / "b.png").write_bytes(png())
    return raw


def png():
    out = io.BytesIO()
    gradient(20, 10).save(out, "PNG")
    return out.getvalue()


def stored(raw, name, **options):
    """Every sample of a conversion: (key, conversation, its media)."""
    report = write_shards(
        raw,
        raw.parent / "shards",
        max_bad_ratio=0,
        num_workers=1,
        reader=RowReader(raw, RowFormat(name, **options)),
    )
    found = []
    for names in report.shards.values():
        for shard in names:
            for _, key, members in read_tar_samples(raw.parent / "shards" / shard):
                conversation = json.loads(members.pop("json"))
                found.append((key, conversation, members))
    return found


def write_lines(raw, *rows):
    (raw / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def said(conversation):
    return [(turn["role"], turn["content"]) for turn in conversation["messages"]]


ASKED = [("user", "<image>What is it?"), ("assistant", "A gradient.")]


def test_openai_content_parts_become_tags_and_their_images_members(folder):
    uri = "data:image/png;base64," + base64.b64encode(png()).decode()
    parts = [
        {"type": "text", "text": "Same as "},
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "text", "text": "? And "},
        {"type": "image", "image": "images/a.jpg"},
    ]
    row = [{"role": "user", "content": parts}, {"role": "assistant", "content": "No."}]
    write_lines(folder, {"messages": row})
    ((_, conversation, media),) = stored(folder, "messages")
    assert said(conversation) == [("user", "Same as <image>? And <image>"), ("assistant", "No.")]
    assert conversation["images"] == ["0.png", "1.jpg"]
    assert media == {"0.png": png(), "1.jpg": jpeg()}


def test_a_sound_in_a_content_part_is_base64_whatever_its_kind(folder):
    """OpenAI's input_audio, where an MP3 has no beginning that tells base64 from a path."""
    sound = b"\xff\xf3\x48\xc4" + bytes(60)  # MPEG 2, as speech often is
    part = {"data": base64.b64encode(sound).decode(), "format": "mp3"}
    parts = [{"type": "input_audio", "input_audio": part}, {"type": "text", "text": "What is it?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Silence."}]
    write_lines(folder, {"messages": turns})
    ((_, conversation, media),) = stored(folder, "messages")
    assert said(conversation)[0] == ("user", "<audio>What is it?")
    assert media == {"a0.mp3": sound}


def test_a_part_without_a_source_takes_the_rows_own_image(folder):
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A gradient."}]
    write_lines(folder, {"messages": turns, "images": ["images/b.png"]})
    ((_, conversation, media),) = stored(folder, "messages")
    assert said(conversation) == ASKED
    assert list(media.values()) == [png()]


def test_sharegpt_with_a_system_prompt_and_several_turns(folder):
    turns = [
        {"from": "human", "value": "<image>What is it?"},
        {"from": "gpt", "value": "A gradient."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    write_lines(folder, {"system": "Be brief.", "conversations": turns, "images": ["images/a.jpg"]})
    ((_, conversation, _),) = stored(folder, "sharegpt")
    assert said(conversation) == [
        ("system", "Be brief."), *ASKED, ("user", "Sure?"), ("assistant", "Yes."),
    ]  # fmt: skip


def test_llava_pretrain_is_one_json_list_with_image_paths(folder):
    rows = [
        {
            "id": f"00453/00{i}",
            "image": "a.jpg",
            "conversations": [
                {"from": "human", "value": f"Render {i} ✓\n<image>"},
                {"from": "gpt", "value": "select luxury furniture"},
            ],
        }
        for i in range(25)
    ]
    (folder / "chat.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    (folder / "images" / "a.jpg").rename(folder / "a.jpg")
    found = stored(folder, "llava")
    assert [key for key, _, _ in found] == [f"train-{n:06d}" for n in range(1, 26)]
    assert said(found[24][1])[0] == ("user", "Render 24 ✓\n<image>")
    assert found[0][2] == {"0.jpg": jpeg()}


def test_alpaca_joins_instruction_and_input(folder):
    write_lines(folder, {"instruction": "Translate.", "input": "Katze", "output": "cat"})
    ((_, conversation, _),) = stored(folder, "alpaca")
    assert said(conversation) == [("user", "Translate.\nKatze"), ("assistant", "cat")]


def test_query_response_puts_history_before_and_tags_in_front(folder):
    row = {"query": "What is it?", "response": "A gradient.", "history": [["Hi", "Hello."]]}
    write_lines(folder, {**row, "images": ["images/a.jpg"]})
    ((_, conversation, _),) = stored(folder, "query_response")
    assert said(conversation) == [
        ("user", "<image>Hi"), ("assistant", "Hello."),
        ("user", "What is it?"), ("assistant", "A gradient."),
    ]  # fmt: skip


def test_text_alone_is_a_turn_to_be_continued(folder):
    write_lines(folder, {"text": "Once upon a time"})
    ((_, conversation, _),) = stored(folder, "text")
    assert conversation == {
        "messages": [{"role": "assistant", "content": "Once upon a time"}], "images": [],
    }  # fmt: skip


def test_parquet_with_an_image_column_as_latex_ocr_has_it(folder):
    images = [{"bytes": jpeg(30 + i, 20), "path": f"{i}.jpg"} for i in range(7)]
    table = pa.table({"image": images, "text": [f"\\frac{{{i}}}{{2}}" for i in range(7)]})
    pq.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=3)
    found = stored(folder, "parquet", prompt="Read the formula.")
    assert len(found) == 7
    for i, (_, conversation, media) in enumerate(found):
        text = f"\\frac{{{i}}}{{2}}"
        assert said(conversation) == [("user", "<image>Read the formula."), ("assistant", text)]
        assert media == {"0.jpg": jpeg(30 + i, 20)}


def test_parquet_is_read_from_the_middle_of_a_row_group(folder):
    pq.write_table(
        pa.table({"text": [f"row {i}" for i in range(100)]}), folder / "train.parquet",
        row_group_size=33,
    )  # fmt: skip
    report = write_shards(
        folder, folder.parent / "out", max_bad_ratio=0, num_workers=1, max_samples_per_shard=7,
        reader=RowReader(folder, RowFormat("auto")),
    )  # fmt: skip
    assert len(report.shards["train"]) == 15
    texts = [
        json.loads(members["json"])["messages"][0]["content"]
        for name in report.shards["train"]
        for _, _, members in read_tar_samples(folder.parent / "out" / name)
    ]
    assert texts == [f"row {i}" for i in range(100)]


def test_columns_are_renamed_as_the_recipe_says(folder):
    write_lines(folder, {"picture": "images/a.jpg", "formula": 42})
    columns = {"picture": "images", "formula": "response"}
    ((_, conversation, media),) = stored(folder, "query_response", columns=columns)
    assert said(conversation) == [("user", "<image>"), ("assistant", "42")]
    assert media == {"0.jpg": jpeg()}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "2 + 2?", "answer": "4"}, [("user", "2 + 2?"), ("assistant", "4")]),
        ({"image": "images/a.jpg", "caption": "A."}, [("user", "<image>"), ("assistant", "A.")]),
        ({"instruction": "Sum.", "output": "4"}, [("user", "Sum."), ("assistant", "4")]),
        ({"text": "Once"}, [("assistant", "Once")]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
         [("user", "Hi"), ("assistant", "Ho")]),
    ],
)  # fmt: skip
def test_auto_tells_the_format_by_the_columns(folder, row, expected):
    write_lines(folder, row)
    ((_, conversation, _),) = stored(folder, "auto")
    assert said(conversation) == expected


@pytest.mark.parametrize("name", ["messages", "sharegpt"])
def test_rows_of_another_layout_are_refused_with_the_way_to_it(folder, name):
    write_lines(folder, {"text": "Once"})
    with pytest.raises(DataError, match="bad_row.*it has no turns; format: auto goes by"):
        stored(folder, name)


def test_webdataset_members_are_taken_as_they_are(folder):
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    members = {
        "000/1.jpg": jpeg(), "000/1.json": json.dumps(talk).encode(),
        "000/2.png": png(), "000/2.txt": b"a caption",
        "000/3.json": json.dumps({"messages": [
            {"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "Yes."}
        ], "images": ["1.png", "0.jpg"]}).encode(),
        "000/3.0.jpg": jpeg(9, 9), "000/3.1.png": png(),
    }  # fmt: skip
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = stored(folder, "webdataset")
    assert [said(conversation)[-1][1] for _, conversation, _ in found] == [
        "A cat.", "a caption", "Yes.",
    ]  # fmt: skip
    assert [media for _, _, media in found] == [
        {"0.jpg": jpeg()}, {"0.png": png()}, {"0.png": png(), "1.jpg": jpeg(9, 9)},
    ]  # fmt: skip


REJECTED = [("user", "2 + 2?"), ("assistant", "5")]
PREFERENCES = [
    {"query": "2 + 2?", "response": "4", "rejected_response": "5"},
    {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    {"chosen": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}],
     "rejected": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "5"}]},
    {"conversations": [{"from": "human", "value": "2 + 2?"}],
     "chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}},
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}],
     "rejected_messages": [{"role": "user", "content": "2 + 2?"},
                           {"role": "assistant", "content": "5"}]},
]  # fmt: skip


@pytest.mark.parametrize("row", PREFERENCES)
def test_what_was_rejected_is_kept_beside_what_was_chosen(folder, row):
    write_lines(folder, row)
    ((_, conversation, _),) = stored(folder, "auto")
    assert said(conversation) == [("user", "2 + 2?"), ("assistant", "4")]
    rejected = [(turn["role"], turn["content"]) for turn in conversation["rejected_messages"]]
    assert rejected == REJECTED


def test_chosen_turns_bring_their_own_images_and_are_read_in_any_format(folder):
    """As TRL has it, with the picture in a content part; and as LLaMA-Factory has it, sharegpt."""
    asked = [{"type": "image", "image": "images/b.png"}, {"type": "text", "text": "2 + 2?"}]
    answers = {name: {"role": "assistant", "content": text} for name, text in
               (("chosen", "4"), ("rejected", "5"))}  # fmt: skip
    whole = {name: [{"role": "user", "content": asked}, turn] for name, turn in answers.items()}
    write_lines(folder, {"prompt": asked[1]["text"], **whole}, {
        "prompt": None, "conversations": [{"from": "human", "value": "<image>2 + 2?"}],
        "chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"},
        "images": ["images/b.png"],
    })  # fmt: skip
    for name in ("auto", "messages", "sharegpt"):
        found = stored(folder, name)
        assert len(found) == 2
        for _, conversation, media in found:
            assert said(conversation) == [("user", "<image>2 + 2?"), ("assistant", "4")]
            rejected = [turn["content"] for turn in conversation["rejected_messages"]]
            assert rejected == ["<image>2 + 2?", "5"]
            assert media == {"0.png": png()}


def test_images_come_from_a_url_base64_and_an_absolute_path_inside(folder):
    class Pictures(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            self.send_response(200 if self.path == "/a.jpg" else 404)
            self.end_headers()
            self.wfile.write(jpeg() if self.path == "/a.jpg" else b"")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        text = base64.b64encode(jpeg()).decode()
        good = [f"{url}/a.jpg", text, str(folder / "images" / "b.png")]
        turns = [{"role": "user", "content": "<image>" * 3}, {"role": "assistant", "content": "x"}]
        gone = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "x"}]
        write_lines(
            folder, {"messages": turns, "images": good},
            {"messages": gone, "images": [f"{url}/gone.jpg"]},
        )  # fmt: skip
        report = write_shards(folder, folder.parent / "out", max_bad_ratio=0.5, num_workers=1)
    finally:
        server.shutdown()
        server.server_close()
    assert report.dropped == {"fetch_failed": 1}
    assert "HTTP 404" in report.examples["fetch_failed"][0]
    ((_, _, members),) = read_tar_samples(folder.parent / "out" / "train-000000.tar")
    assert members["0.jpg"] == members["1.jpg"] == jpeg()
    assert members["2.png"] == png()


def test_limit_and_sample_choose_rows_that_do_not_depend_on_shard_size(folder):
    from data_prep.rows import Pick

    write_lines(folder, *({"text": f"row {i}"} for i in range(200)))
    pick = Pick(limit=150, sample=20, seed=3)
    keys = []
    for size in (7, 1000):
        out = folder.parent / f"out{size}"
        report = write_shards(
            folder, out, max_bad_ratio=0, num_workers=1, pick=pick, max_samples_per_shard=size,
            reader=RowReader(folder, RowFormat("text")),
        )  # fmt: skip
        keys.append(
            [key for name in report.shards["train"] for _, key, _ in read_tar_samples(out / name)]
        )
    assert keys[0] == keys[1]
    assert len(keys[0]) == 20
    assert max(keys[0]) <= "train-000150"


def test_a_video_is_stored_as_it_came(folder, make_video):
    data = make_video(num_frames=30, fps=10)
    (folder / "clip.bin").write_bytes(data)
    turns = [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "Grey."}]
    write_lines(folder, {"messages": turns, "videos": ["clip.bin"]})
    ((_, conversation, media),) = stored(folder, "messages")
    assert conversation["videos"] == ["v0.mp4"]
    assert media == {"v0.mp4": data}


def test_a_picture_of_any_kind_is_named_by_its_content(folder):
    for kind, extension in (("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp"), ("TIFF", "tiff")):
        Image.new("RGB", (8, 8), "red").save(folder / "images" / "a.jpg", kind)
        write_lines(folder, {"image": "images/a.jpg", "caption": "Red."})
        ((_, conversation, _),) = stored(folder, "auto")
        assert conversation["images"] == [f"0.{extension}"]
