"""The report: right at any moment of a run, self-contained, and safe with whatever the files hold."""

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qwen3_vlm.config import RunConfig, dump_yaml
from qwen3_vlm.errors import ConfigError
from qwen3_vlm.evaluate.environment import describe_environment
from qwen3_vlm.evaluate.gates import equality_gate, limit_gate, rate_gate
from qwen3_vlm.evaluate.golden import GoldenItem, thumbnail_uri
from qwen3_vlm.evaluate.intervals import Interval, wilson_interval
from qwen3_vlm.evaluate.report import cell, duration, write_report
from qwen3_vlm.evaluate.report_gates import gates_of, verdict_of
from qwen3_vlm.evaluate.run_files import read_run
from qwen3_vlm.evaluate.token_golden import dump_token_golden
from qwen3_vlm.evaluate.word_marks import mark_words
from tests.evaluate.helpers import picture
from tests.evaluate.token_stubs import plain_records
from tests.tokenization.plain_codecs import plain_uti

EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Collects tags, addresses and text; a stray or missing end tag is an error."""

    VOID = frozenset({"meta", "img", "link", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.attributes: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def lines(*items: dict[str, Any]) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


def page(run: Path) -> Page:
    path = write_report(run)
    assert path == run / "report.html"
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "my-run"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_yaml(RunConfig()))
    return folder


def gate(name: str = "shuffled", passed: bool = True) -> dict[str, Any]:
    return {"name": f"{name} - correct", "value": 1.5, "low": 1.2, "high": 1.8, "threshold": 0.05, "samples": 256,
            "win_rate": 0.9, "win_rate_low": 0.85, "win_rate_high": 0.93, "passed": passed,
            "reason": "" if passed else "The gap is 0.01."}  # fmt: skip


def full_run(run: Path, text: str = "a cat") -> Path:
    train = [{"kind": "train", "step": step, "loss": 5 / step, "learning_rate": 1e-4, "grad_norm": 1.0,
              "tokens_per_second": 100.0 * step, "seconds": 30.0, "peak_memory_mib": 800 + step}
             for step in range(1, 11)]  # fmt: skip
    evaluation = {"kind": "quick_eval", "step": 5, "loss": 2.0, "loss_le10": 1.0, "samples": 200, "truncated": 3,
                  "zero_label": 0, "label_length_p50": 12.0}  # fmt: skip
    final = {"kind": "final", "step": 10, "loss": 1.0, "seconds": 75.0, "trainable_parameters": 82_445_824}
    (run / "metrics.jsonl").write_text(lines(*train, evaluation, final))
    (run / "skipped.jsonl").write_text(lines({"reason": "missing_image"}, {"reason": text}))
    (run / "environment.json").write_text(json.dumps({**describe_environment(), "cpu": text}))
    (run / "golden").mkdir()
    for step, prediction in ((5, "nothing"), (10, text)):
        item = GoldenItem("p1", step, f"<image>\n{text}?", "a cat", prediction, prediction == "a cat", ("p.png",))
        (run / f"golden/step-{step:06d}.jsonl").write_text(lines(asdict(item)))
    (run / "golden/thumbnails.json").write_text(json.dumps({"p1": [thumbnail_uri(picture(0))]}))
    (run / "connector").mkdir()
    losses = {name: {"value": 1.0, "low": 0.9, "high": 1.1} for name in ("correct", "shuffled", "zero", "noise")}
    evidence = {"gates": [gate(), gate("zero"), gate("noise")],
                "ablation": {"losses": losses, "order": {"correct < shuffled": True}}}  # fmt: skip
    (run / "connector/evidence.json").write_text(json.dumps(evidence))
    (run / "results").mkdir()
    table = {"title": text, "note": text, "headline": {"label": text, "text": "62 %"},
             "rows": [{"split": text, "exact": {"percent": 0.62, "low": 0.58, "high": 0.66}}, {"n": 1234}]}  # fmt: skip
    (run / "results/captions.json").write_text(json.dumps(table))
    return run


def test_a_finished_run(run: Path) -> None:
    seen = page(full_run(run))
    for text in ("my-run", "The pictures are used: all 3 gates pass", "1.500 nats per token", "interval 1.200 … 1.800",
                 "62.0 %", "58.0 … 66.0 %", "1,234", "1 of 1", "1 min 15 s", "82,445,824", "a cat", "nothing",
                 "missing_image", "torch", "learning_rate: 0.0001", "2.00 → 1.00"):  # fmt: skip
        assert text in seen.text, text
    assert seen.tags.count("svg") == 9
    assert seen.tags.count("img") == 1


def test_nothing_is_loaded_and_nothing_runs(run: Path) -> None:
    seen = page(full_run(run, EVIL))
    assert all(address.startswith("data:image/") for address in seen.addresses)
    assert not {"script", "link", "iframe", "object", "embed"} & set(seen.tags)
    assert not [name for name in seen.attributes if name.startswith("on")]
    assert EVIL in seen.text  # shown as it is, as text
    source = (run / "report.html").read_text(encoding="utf-8")
    assert "url(" not in source
    assert "@import" not in source
    assert not re.search(r"https?://", source)


def test_control_characters_are_shown_not_sent(run: Path) -> None:
    full_run(run, "a\x1b[31m\x00cat")
    page(run)
    source = (run / "report.html").read_text(encoding="utf-8")
    assert "␛[31m␀cat" in source
    assert not [char for char in source if ord(char) < 32 and char not in "\n\t"]


def test_only_pictures_as_data_reach_the_browser(run: Path) -> None:
    full_run(run)
    hostile = [
        "https://example.org/x.png",
        'data:image/png;base64,AA" onerror="alert(1)',
        "data:text/html;base64,AA",
        3,
    ]
    (run / "golden/thumbnails.json").write_text(json.dumps({"p1": hostile}))
    rows = [{"picture": {"image": address}} for address in hostile]
    (run / "results/captions.json").write_text(json.dumps({"title": "t", "rows": rows}))
    assert page(run).addresses == []


def test_the_first_minute_of_a_run(run: Path) -> None:
    seen = page(run)
    assert "No gate has been measured yet: the run is at step 0" in seen.text
    assert "svg" not in seen.tags


def test_a_torn_line_and_a_resume(run: Path) -> None:
    torn = lines({"kind": "train", "step": 1, "loss": 9.0}, {"kind": "train", "step": 2, "loss": 8.0})
    again = lines({"kind": "train", "step": 2, "loss": 3.0}, {"kind": "train", "step": 3, "loss": float("nan")})
    (run / "metrics.jsonl").write_text(torn + '{"kind": "train", "st\n' + again + '{"kind"')
    files = read_run(run)
    assert [(line["step"], line["loss"]) for line in files.of_kind("train")][:2] == [(1, 9.0), (2, 3.0)]
    assert files.step == 3
    page(run)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"gates": 3, "ablation": [], "environment": 4}',
                                     '{"gates": [{}, 5, {"value": "x", "passed": true}], "ablation": {"losses": []}}',
                                     "[" * 100_000])  # fmt: skip
def test_damaged_files_do_not_hide_the_run(run: Path, content: str) -> None:
    full_run(run)
    for name in ("connector/evidence.json", "environment.json", "golden/thumbnails.json", "results/captions.json",
                 "golden/step-000010.jsonl", "skipped.jsonl"):  # fmt: skip
        (run / name).write_text(content)
    assert "my-run" in page(run).text


def test_a_failing_gate_is_said_first(run: Path) -> None:
    full_run(run)
    evidence = {"gates": [gate("shuffled", passed=False), gate("zero")]}
    (run / "connector/evidence.json").write_text(json.dumps(evidence))
    text = page(run).text
    assert "1 of 2 gates fail" in text
    assert "shuffled − correct: The gap is 0.01." in text
    assert "all 3 gates pass" not in text


def test_a_broken_order_is_said_beside_the_verdict(run: Path) -> None:
    full_run(run)
    order = {"correct < shuffled": True, "shuffled < zero": False}
    (run / "connector/evidence.json").write_text(json.dumps({"gates": [gate()], "ablation": {"order": order}}))
    assert "does not hold throughout; not so: shuffled < zero." in page(run).text


@pytest.mark.parametrize(("low", "samples", "kind"), [(0.2, 256, "good"), (-0.1, 256, "bad"), (0.2, 100, "bad")])
def test_gates_while_training_come_from_the_last_ablation_line(run: Path, low: float, samples: int, kind: str) -> None:
    names = ("shuffled", "zero", "noise")
    values = {f"gap_{name}{end}": value for name in names for end, value in (("", 0.3), ("_low", low), ("_high", 0.4))}
    old = {"kind": "ablation", "step": 1, "samples": 256, **{f"gap_{name}": -1.0 for name in names}}
    (run / "metrics.jsonl").write_text(lines(old, {"kind": "ablation", "step": 2, "samples": samples, **values}))
    files = read_run(run)
    gates = gates_of(files)
    assert len(gates) == 3
    assert gates[0]["threshold"] == 0.05  # from config.yaml
    assert verdict_of(files, gates).kind == kind


def test_no_run_folder_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a folder"):
        write_report(tmp_path / "missing")
    with pytest.raises(ConfigError, match="neither"):
        write_report(tmp_path)


def test_cells() -> None:
    assert cell({"value": 1.23456, "low": 1, "high": 2.5}) == '1.235 <span class="range">1 … 2.5</span>'
    assert cell({"percent": 0.5}) == "50.0 %"
    assert [cell(value) for value in (None, 12345, 0.00012345, 54321.0, "<")] == [
        "–",
        "12,345",
        "0.0001234",
        "54,321",
        "&lt;",
    ]
    assert "✓" in cell(True)


def test_words_that_differ_are_marked() -> None:
    assert mark_words("a red dog", "a red cat") == "a red <mark>dog</mark>"
    assert mark_words("a <b> cat", "a cat") == "a <mark>&lt;b&gt;</mark> cat"
    assert mark_words("", "a cat") == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.26, "4.3 s"), (42, "42 s"), (75, "1 min 15 s"), (8000, "2 h 13 min"), (59.9, "1 min 0 s")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_loss_of_texts_and_their_kl_have_curves(tmp_path: Path) -> None:
    """Of stages with an adapter: beside the losses, one chart each; without texts there is none."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_yaml(RunConfig(stage="stage2_sft")))
    train = [{"kind": "train", "step": step, "loss": 5 / step} for step in (1, 5, 10)]
    titles = ["Loss of texts", "KL of text from the base"]
    (run / "metrics.jsonl").write_text(lines(*train))
    assert not any(title in write_report(run).read_text() for title in titles)
    texts = [line | {"text_kl": 0.01 * line["step"], "loss_text": 4.0 - 0.1 * line["step"]} for line in train]
    (run / "metrics.jsonl").write_text(lines(*texts))
    page = write_report(run).read_text()
    charts = [re.search(rf'<figure class="chart"><figcaption>{title}.*?</figure>', page) for title in titles]
    for chart in charts:
        assert chart is not None
        heights = [float(place.split()[1]) for place in re.search(r'd="M([^"]*)"', chart[0])[1].split("L")]  # type: ignore[index]
        assert len(heights) == 3
        rises = chart is charts[1]  # pixels count downwards
        assert heights == sorted(heights, reverse=rises)


def test_environment_names_neither_host_nor_paths() -> None:
    import platform

    text = json.dumps(describe_environment())
    assert platform.node() not in text
    assert "/" not in text.replace("N/A", "")
    assert describe_environment()["packages"]["torch"]


# The run of a token LM ---------------------------------------------------------------------------------------


def token_run(run: Path, text: str = "a cat", *, changed: int = 0) -> Path:
    """A finished run over tokens: losses by task, gates of every kind, two dumps of two tasks each."""
    tasks = {"loss_i2t": 2.0, "loss_t2i": 3.0, "loss_nonsense": 9.0}
    train = [{"kind": "train", "step": step, "loss": 5 / step, **tasks, "row_norm_mean": 1.0, "row_norm_min": 0.5,
              "row_norm_max": 2.0} for step in (1, 5, 10)]  # fmt: skip
    evaluation = {"kind": "eval", "step": 10, "loss": 2.0, "loss_i2t": 1.5, "samples": 20}
    final = {"kind": "final", "step": 10, "loss": 2.0, "add_on_bytes": 123_456}
    (run / "metrics.jsonl").write_text(lines(*train, evaluation, final))
    losses = {name: {"value": 1.0, "low": 0.9, "high": 1.1} for name in ("correct", "shuffled", "noise", "constant")}
    gates = [
        equality_gate("parameter integrity", "tensors", changed, 311),
        equality_gate("text identity: logits", "texts", 0, 32),
        {**gate("i2t: shuffled"), "min_win_rate": 0.8},
        {**gate("t2i: prompt empty"), "value": 0.4, "low": 0.3, "high": 0.5},
        rate_gate("t2i: decodes", wilson_interval(64, 64), 64),
    ]
    (run / "rows").mkdir()
    evidence = {"gates": gates, "token_ablation": {"i2t": {"losses": losses}, "a2t": "torn"}}
    (run / "rows/evidence.json").write_text(json.dumps(evidence))
    uti = plain_uti()
    records = [(f"{text} {name}", ids) for name, ids in plain_records(uti, 2)]

    def model(prompts: Any) -> list[Any]:
        ends = {task: uti.token_space.special(end) for task, end in (("i2t", "<|text_end|>"), ("t2i", "<|img_end|>"))}
        words = uti.encode_text(f"a blue heart {text}")
        return [[*(words if task == "i2t" else records[0][1]["image"]), ends[task]] for task, _ in prompts]

    for step in (5, 10):
        dump_token_golden(uti, model, {"i2t": records, "t2i": records}, run / "golden", step=step)
    sounds = {"t2a": records}
    cut = dump_token_golden(uti, lambda prompts: [[7]] * len(prompts), sounds, run / "golden", step=3)
    assert cut[0].error
    return run


def test_the_run_of_a_token_lm(run: Path) -> None:
    seen = page(token_run(run))
    for text in ("The base is as it was, sources and prompts are used, everything generated decodes: all 5 gates pass",
                 "Without its own source or prompt the model loses at least 0.400 nats per token", "4 of 4",
                 "0 of 311 tensors differ", "94.3 … 100.0 %", "i2t: shuffled − correct", "Training loss by task",
                 "Norms of the new rows", "i2t: loss under each condition", "i2t: picture to words",
                 "t2i: words to picture", "a red heart 0", "123,456 bytes", "ids as in the reference"):  # fmt: skip
        assert text in seen.text, text
    assert "nonsense" not in seen.text
    assert "look at the picture" not in seen.text
    assert seen.tags.count("img") == 2 + 4 + 2  # given, reference and generated, earlier
    assert seen.tags.count("mark") > 0, "words that differ are marked"


def test_a_changed_base_is_the_first_thing_that_is_said(run: Path) -> None:
    seen = page(token_run(run, changed=2))
    assert "1 of 5 gates fail" in seen.text
    assert "parameter integrity: 2 of 311 tensors differ; none may." in seen.text


def test_a_token_page_loads_and_runs_nothing_either(run: Path) -> None:
    folder = token_run(run, EVIL)
    (path,) = folder.glob("golden/step-000010/items.jsonl")
    item = {**json.loads(path.read_text().split("\n")[0]), "source_file": "../../../x.png", "task": EVIL}
    path.write_text(path.read_text() + json.dumps(item) + "\n")
    seen = page(folder)
    assert all(address.startswith("data:image/png;base64,") for address in seen.addresses)
    assert not {"script", "link", "iframe", "object", "embed"} & set(seen.tags)
    assert not [name for name in seen.attributes if name.startswith("on")]


def test_sounds_can_be_heard(run: Path) -> None:
    uti = plain_uti()
    records, end = plain_records(uti, 1), uti.token_space.special("<|aud_end|>")
    model = lambda prompts: [[*records[0][1]["audio"], end]]  # noqa: E731
    dump_token_golden(uti, model, {"t2a": records}, run / "golden", step=1)
    seen = page(run)
    assert seen.tags.count("audio") == 2
    assert [address[:14] for address in seen.addresses].count("data:audio/wav") == 2
    assert "t2a: words to sound" in seen.text


def test_limits_on_what_an_adapter_moved(run: Path) -> None:
    folder = full_run(run)
    path = folder / "connector/evidence.json"
    evidence = json.loads(path.read_text())
    evidence["gates"].append(limit_gate("text drift: KL", Interval(0.02, 0.01, 0.03), 0.1, 32))
    path.write_text(json.dumps(evidence))
    seen = page(folder)
    assert "The pictures are used, text behaviour stays within its limits: all 4 gates pass" in seen.text
    assert "at most 0.1" in seen.text
    assert "at least 1.500 nats per token" in seen.text, "the drift is no gap"


def test_a_torn_token_run_is_still_a_page(run: Path) -> None:
    folder = token_run(run)
    (folder / "golden/step-000010/items.jsonl").write_text('{"id": "x", "ste')
    (folder / "rows/evidence.json").write_text('{"gates": [{"name": "a", "kind": "equal"}, {"kind": "rate"}, 3]}')
    for path in (folder / "golden/reference").iterdir():
        path.unlink()
    seen = page(folder)
    assert "2 of 2 gates fail" in seen.text
    assert "not shown" in seen.text
