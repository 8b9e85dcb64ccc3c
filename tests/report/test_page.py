"""The page says what the run's artifacts say, shows what is wrong, and names what is absent."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from vlmcore.evaluation.gates import GateResult
from vlmcore.report import ReportInput, render_report


class Outline(HTMLParser):
    """Checks that tags close in order, and collects links and ids."""

    VOID = {"meta", "img", "br", "link", "input", "hr"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids += [given["id"]] if "id" in given else []
        self.targets += [given[name] for name in ("href", "src") if name in given]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()


def edit_first_answer(folder: Path, **changed) -> None:
    path = folder / "predictions.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | changed), *rest]) + "\n")


def text_of(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", html.split("<body>")[1]).split())


def samples(html: str, verdict: str) -> list[str]:
    return re.findall(rf'<article class="sample {verdict}".*?</article>', html, re.DOTALL)


def test_the_page_is_well_formed_and_needs_nothing_from_elsewhere(run):
    html = render_report(run.report())
    outline = Outline(html)
    assert outline.open == []
    assert len(outline.ids) == len(set(outline.ids))
    inside = {f"#{one}" for one in outline.ids}
    assert all(one in inside or one.startswith("data:image/") for one in outline.targets)
    assert "url(http" not in html
    assert "@import" not in html
    assert len(html.encode()) < 5e6


def test_equal_inputs_give_equal_bytes(run):
    assert render_report(run.report()) == render_report(run.report())


def test_the_header_says_what_came_out_and_whether_the_gates_hold(run):
    gates = [
        GateResult("holdout.exact_match >= 0.9", 0.9, passed=True),
        GateResult("align.holdout.exact_match >= 0.7", 0.6, passed=False),
    ]
    header = text_of(render_report(run.report(gates=gates)).split("<main>")[0])
    assert "90.0 % holdout.exact_match of full : 54 of 60 answers right" in header
    assert "✓ gate holdout.exact_match &gt;= 0.9: 0.9" in header
    assert "✗ gate align.holdout.exact_match &gt;= 0.7: 0.6" in header
    assert "Swap proof passed" in header
    seconds = sum(record.seconds for record in run.report().records)
    minutes, rest = divmod(round(seconds), 60)
    assert f"{minutes} min {rest:02} s" in header
    assert "python&nbsp; 3." in header


def test_a_score_stands_with_its_count_and_its_95_percent_interval(run):
    text = text_of(render_report(run.report()))
    # Wilson's interval of 36 of 60 and 54 of 60, as scipy.stats.binomtest gives it
    assert "align 60.0 % 36 of 60 (47.4 % – 71.4 %)" in text
    assert "full 90.0 % 54 of 60 (79.9 % – 95.3 %)" in text


def test_every_stage_is_a_box_that_leads_to_its_row(run):
    report = run.report()
    html = render_report(report)
    graph, table = html.split('<h2 id="proofs">')[0], html.split('<h2 id="stages">')[1]
    for record in report.records:
        assert f'<a href="#stage-{record.stage}"' in graph
        assert record.digest[:8] in graph
        assert f'<tr id="stage-{record.stage}">' in table
        assert f'<code title="{record.key}">' in table
    num_inputs = sum(len(record.input_refs) for record in report.records)
    assert graph.count('class="edge"') == num_inputs


def test_wrong_answers_are_marked_and_come_first(run):
    html = render_report(run.report())
    wrong, right = samples(html, "wrong"), samples(html, "right")
    assert (len(wrong), len(right)) == (6, 18)
    assert html.index(wrong[-1]) < html.index(right[0])
    assert all(re.search(r'<dd class="bad">\d+ ✗</dd>', one) for one in wrong)
    assert all(re.search(r'<dd class="good">\d+ ✓</dd>', one) for one in right)
    assert all(
        "<dt>swap</dt>" in one and "<dt>align</dt>" in one and "<dt>full</dt>" not in one
        for one in wrong + right
    )
    assert all('src="data:image/png;base64,' in one for one in wrong + right)
    assert "All its 6 wrong answers first, then 18 of 54 right ones" in text_of(html)


def test_what_a_model_says_is_text_and_not_markup(build_run):
    def change(stage, folder):
        if stage == "evaluate.full.holdout":
            attack = "<script>alert('x')</script>"
            edit_first_answer(folder, prediction=attack, question="<b>?", correct=False)

    html = render_report(build_run(change).report(name="<i>name", recipe="name: <u>x</u>"))
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; ✗" in html
    assert "<script" not in html
    assert "<b>?" not in html
    assert "<i>name" not in html
    assert "name: &lt;u&gt;x&lt;/u&gt;" in html
    assert Outline(html).open == []


def test_an_absent_proof_is_named_and_the_rest_stays(build_run):
    def change(stage, folder):
        if stage in ("swap", "to_mcore"):
            (folder / "left.json").write_text("{}")
            for name in ("proof.json", "precision.json"):
                (folder / name).unlink(missing_ok=True)

    text = text_of(render_report(build_run(change).report()))
    assert "– Swap proof absent" in text
    assert "proof.json is absent from the artifact of swap." in text
    assert "precision.json is absent from the artifact of to_mcore." in text
    assert "Export reload passed, 1 absent" in text


def test_a_document_of_another_shape_is_named(build_run):
    def change(stage, folder):
        if stage == "swap":
            (folder / "proof.json").write_text('{"vision_max_diff": 0.0}')
        if stage == "train.full":
            with (folder / "metrics.jsonl").open("a") as file:
                file.write('{"step": 301, "lo')

    text = text_of(render_report(build_run(change).report()))
    assert (
        "proof.json in the artifact of swap cannot be read: text_logits_max_diff: Field required"
    ) in text
    assert "metrics.jsonl in the artifact of train.full cannot be read: Invalid JSON" in text


def test_a_run_that_never_swapped_converted_or_scored_says_so(run):
    report = run.report()
    few = [record for record in report.records if record.stage.startswith("data.")]
    folders = {record.stage: report.folders[record.stage] for record in few}
    html = render_report(
        run.report(records=few, folders=folders, scores={}, gates=[], checkpoints=[])
    )
    assert Outline(html).open == []
    text = text_of(html)
    assert "This run has no stage swap, so there is no proof.json." in text
    assert "This run has no train stage." in text
    assert "No checkpoint of this run was scored." in text
    assert "no gates in the recipe" in text


def test_a_run_without_any_stage_still_has_a_page():
    html = render_report(ReportInput("empty", "name: empty\n", [], {}, {}, [], []))
    assert Outline(html).open == []
    assert "This run has no data.*.shards stage." in html


def test_a_proof_that_failed_is_called_failed(build_run):
    def change(stage, folder):
        if stage == "swap":
            proof = json.loads((folder / "proof.json").read_text())
            proof |= {"text_logits_max_diff": 0.53, "missing_keys": ["model.q_norm"]}
            (folder / "proof.json").write_text(json.dumps(proof))

    html = render_report(build_run(change).report())
    text = text_of(html)
    assert "✗ Swap proof failed" in text
    assert "The swapped model is not the sum of its donors" in text
    assert '<td class="bad">0.53</td>' in html
    assert "model.q_norm" in html


def test_rows_left_out_of_the_data_are_shown_with_cause_and_example(build_run):
    def change(stage, folder):
        if stage == "data.numbers.shards":
            path = folder / "report.json"
            found = json.loads(path.read_text())
            found["dropped"] = {"missing_image": 3}
            found["examples"] = {"missing_image": ["train.jsonl:7 images/gone.png"]}
            path.write_text(json.dumps(found))

    text = text_of(render_report(build_run(change).report()))
    assert "106 images. 3 rows left out" in text
    assert "missing_image 3 train.jsonl:7 images/gone.png" in text


def test_training_figures_are_sums_and_medians_over_all_steps(run):
    html = render_report(run.report())
    section = text_of("<body>" + html.split('<h2 id="training">')[1].split('<h2 id="scores">')[0])
    rows = [
        json.loads(line)
        for line in (run.folders["train.align"] / "metrics.jsonl").read_text().splitlines()
    ]
    final = sum(row["loss"] for row in rows[-10:]) / 10
    assert f"final loss, mean of the last 10 {final:.3g}" in section
    assert "samples seen 9,600" in section
    assert f"tokens {sum(row['tokens'] for row in rows):,}" in section
    assert "aligner 123,456 trained llm 1,234,567 frozen" in section
    fill = sum(row["packing_fill"] for row in rows) / len(rows)
    assert f"rows filled by packing {fill:.1%}".replace("%", " %") in section
    assert "samples dropped" not in section


def test_speed_is_that_of_a_median_step_after_the_warm_up(build_run):
    def change(stage, folder):
        if stage == "train.full":
            path = folder / "metrics.jsonl"
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            slow = {"tokens_per_s": 1.0, "samples_per_s": 1.0, "tflops_per_rank": 1e-9}
            rows = [row | (slow if row["step"] <= 30 else {"mfu": 0.4321}) for row in rows]
            rows[6]["largest_rank_memory_mb"] = 56_789
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    html = render_report(build_run(change).report())
    align, full = (text_of("<body>" + one) for one in html.split('<p class="speed">')[2:4])
    assert "Medians of steps 31 – 300 time of a step 0.1 s waiting for data 4.0 %" in full
    assert "samples/s 303 tokens/s 9," in full  # 320 less a tenth of the middle step, 165.5
    assert "TFLOP/s per rank 0.0217 MFU 43.2 % peak memory, largest rank 56,789 MB" in full
    assert "samples/s 303" in align
    assert "MFU" not in align
    assert "peak memory, largest rank 1,230 MB" in align


def test_a_run_without_megatron_has_no_precision_to_miss(run):
    report = run.report()
    records = [
        one.model_copy(update={"params": one.params | {"engine": "transformers"}})
        if one.stage.startswith("train.")
        else one
        for one in report.records
        if not one.stage.startswith("to_mcore")
    ]
    folders = {one.stage: report.folders[one.stage] for one in records}
    html = render_report(run.report(records=records, folders=folders))
    assert Outline(html).open == []
    text = text_of(html)
    assert "there is no Megatron-Core model whose logits could differ" in text
    assert "Precision absent" not in text
    assert "no stage to_mcore" not in text
    megatron = run.report(records=report.records[:0], folders={})
    assert "– Precision absent" in text_of(render_report(megatron))


def test_samples_that_training_drops_stand_by_cause(build_run):
    def change(stage, folder):
        if stage == "train.align":
            first, *rest = (folder / "metrics.jsonl").read_text().splitlines()
            causes = {"bad_media": 1, "too_long": 1200}
            row = json.loads(first) | {"dropped_by_cause": causes}
            (folder / "metrics.jsonl").write_text("\n".join([json.dumps(row), *rest]))

    text = text_of(render_report(build_run(change).report()))
    assert "samples dropped 1,200 too_long , 1 bad_media" in text


def test_large_images_are_made_small_and_an_unreadable_one_is_named(build_run):
    def change(stage, folder):
        if stage == "data.numbers.holdout":
            for path in (folder / "images").iterdir():
                path.unlink()  # its bytes are shared with the raw dataset by a hard link
                noise = Image.frombytes("RGB", (600, 400), os.urandom(600 * 400 * 3))
                noise.save(path, "PNG")
        if stage == "evaluate.full.holdout":
            edit_first_answer(folder, image="images/gone.png", correct=False)

    html = render_report(build_run(change).report())
    assert len(html.encode()) < 5e6
    answers = html.partition('id="scores"')[2]
    assert answers.count('src="data:image/jpeg;base64,') == 23
    assert 'width="384" height="256"' in html
    assert "images/gone.png is not there" in html


def test_the_audit_of_each_dataset_is_shown_and_a_leak_stands_out(build_run):
    def change(stage, folder):
        if stage == "data.numbers.audit":
            found = json.loads((folder / "audit.json").read_text())
            found["figures"]["leaks"] = 21
            found["leaks"] = [["train-000007", "data.numbers.holdout/test-000001", "<same bytes>"]]
            (folder / "audit.json").write_text(json.dumps(found))
        if stage == "data.words.audit":
            (folder / "audit.json").rename(folder / "other.json")

    html = render_report(build_run(change).report())
    data = html.partition('id="data"')[2].partition('id="training"')[0]
    assert '<dt>suspected leaks</dt><dd class="bad">21</dd>' in data
    assert "train-000007" in data
    assert "&lt;same bytes&gt;" in data
    assert "and 20 more" in data
    assert data.count('class="histogram"') == 3
    assert data.count('<article class="sample">') == 16
    assert "audit.json is absent from the artifact of data.words.audit." in data
