"""The audit: what it finds in good tokenizers and in bad ones, its gates, and that its report never varies."""

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen3_vlm.errors import GateError, TokenError, TokenSpaceError
from qwen3_vlm.tokenization.audit import GATES, UTIAudit, audit_uti
from qwen3_vlm.tokenization.audit_checks import HARD_TEXTS
from qwen3_vlm.tokenization.quality import psnr, snr_db
from qwen3_vlm.tokenization.text import LosslessText
from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer
from qwen3_vlm.tokenization.uti_config import TextConfig, UTIConfig
from tests.tiny import tiny_tokenizer
from tests.tokenization.plain_codecs import (
    Broken,
    Dice,
    Gossip,
    Memory,
    Noisy,
    Short,
    Worse,
    plain_pictures,
    plain_sounds,
    plain_uti,
)

TEXTS = ["a red heart", "zwölf Boxkämpfer 🥊"]


def audit(uti: UnifiedTokenizer | None = None, **changes: Any) -> UTIAudit:
    items: dict[str, Any] = {"images": plain_pictures(), "sounds": plain_sounds(), "texts": TEXTS, "reopen": plain_uti}
    return audit_uti(uti or plain_uti(), **{**items, **changes})


def failed(result: UTIAudit) -> set[tuple[str, str]]:
    return {(check["modality"], check["name"]) for check in result.report["checks"] if not check["passed"]}


@pytest.fixture(scope="module")
def good() -> UTIAudit:
    return audit()


def test_a_good_tokenizer_passes(good: UTIAudit) -> None:
    assert good.failures == []
    assert good.passed
    assert good.report["passed"] is True
    names = {(check["modality"], check["name"]) for check in good.report["checks"]}
    for modality in ("image", "audio"):
        for name in ("same ids again", "same ids in a batch", "same ids when opened anew", "ids in range"):
            assert (modality, name) in names
        assert (modality, "ids and metadata suffice, through JSON") in names
        assert (modality, "the loaded tokenizer has the sizes of the token space") in names
    assert ("text", "comes back as it was") in names
    assert len(names) == len(good.report["checks"])


def test_the_figures_are_those_of_the_codec_alone(good: UTIAudit) -> None:
    """Compared are the fitted picture and the resampled sound, not what was there before."""
    uti = plain_uti()
    by_name = {entry["name"]: entry for entry in good.report["items"]}
    wide = plain_pictures()["wide.png"]
    fitted = np.asarray(Image.fromarray(wide).resize((16, 10), Image.Resampling.BICUBIC))
    canvas = np.full((16, 16, 3), 255, np.uint8)
    canvas[3:13] = fitted
    decoded = uti.image_tokenizer.decode(uti.image_tokenizer.encode(canvas[None]))[0]
    assert by_name["wide.png"]["psnr_db"] == pytest.approx(psnr(canvas, decoded))
    wave, rate = plain_sounds()["long.wav"]
    encoded = uti.encode_audio(wave, rate)
    assert by_name["long.wav"]["snr_db"] == pytest.approx(snr_db(wave[None], uti.decode_audio(encoded.ids)[0]))
    assert by_name["long.wav"]["ids"] == len(encoded.ids) == 2_000
    values = [by_name[name]["psnr_db"] for name in plain_pictures()]
    figures = good.report["figures"]["image"]["psnr_db"]
    assert figures["mean"] == pytest.approx(np.mean(values))
    assert figures["p50"] == pytest.approx(sorted(values)[1])
    assert figures["p10"] == pytest.approx(np.percentile(values, 10))


def test_silence_has_no_snr_and_does_not_spoil_the_mean(good: UTIAudit) -> None:
    entry = next(entry for entry in good.report["items"] if entry["name"] == "silent.wav")
    assert entry["snr_db"] is None
    assert good.report["figures"]["audio"]["snr_db"]["items"] == 4
    assert good.report["figures"]["audio"]["log_mel_l1"]["items"] == 5


def test_idempotence_is_reported(good: UTIAudit) -> None:
    """These codecs give the same ids from what they decoded, but for last frames that were filled with silence."""
    assert good.report["figures"]["image"]["ids_kept"]["mean"] == 1.0
    kept = {entry["name"]: entry["ids_kept"] for entry in good.report["items"]}
    assert kept["long.wav"] == 1.0
    assert 0.99 < kept["short.wav"] < 1.0, "701 samples do not fill their last frame of 4"
    worse = audit(plain_uti(image=Worse()), reopen=lambda: plain_uti(image=Worse()))
    assert worse.report["figures"]["image"]["ids_kept"]["mean"] < 1.0
    assert worse.passed  # reported, not gated


def test_codes_in_use_are_counted(good: UTIAudit) -> None:
    used = good.report["figures"]["image"]["codes_used"]
    assert [entry["size"] for entry in used] == [64]
    assert 1 < used[0]["used"] < 64
    assert [entry["size"] for entry in good.report["figures"]["audio"]["codes_used"]] == [16, 16]


def test_the_report_is_json_and_never_varies(good: UTIAudit) -> None:
    text = json.dumps(good.report, allow_nan=False, sort_keys=True)
    assert json.dumps(audit().report, allow_nan=False, sort_keys=True) == text
    assert "/" not in json.dumps(good.report["items"])
    assert good.report["token_space_sha256"] == plain_uti().sha256


def test_hashes_tell_items_and_ids_apart(good: UTIAudit) -> None:
    pictures = plain_pictures()
    pictures["wide.png"] = pictures["wide.png"].copy()
    pictures["wide.png"][0, 0, 0] ^= 1
    other = audit(images=pictures)
    assert other.report["items_sha256"]["image"] != good.report["items_sha256"]["image"]
    assert other.report["items_sha256"]["audio"] == good.report["items_sha256"]["audio"]
    assert other.report["ids_sha256"]["audio"] == good.report["ids_sha256"]["audio"]
    renamed = audit(images={f"{name}.copy": picture for name, picture in plain_pictures().items()})
    assert renamed.report["items_sha256"] == good.report["items_sha256"]
    same_bytes = audit(sounds={name: (wave, 8_000) for name, (wave, _) in plain_sounds().items()})
    assert same_bytes.report["items_sha256"]["audio"] != good.report["items_sha256"]["audio"], "the rate counts"


def test_pil_pictures_of_any_mode() -> None:
    pictures = {f"{mode}.png": Image.new(mode, (20, 20), 1) for mode in ("RGB", "L", "P", "RGBA", "1", "CMYK")}
    assert audit(images=pictures).passed


# Tokenizers that break a promise ------------------------------------------------------------------------------


def test_chance_is_found() -> None:
    found = failed(audit(plain_uti(image=Dice())))
    assert {("image", name) for name in ("same ids again", "same ids in a batch", "same ids when opened anew")} <= found
    assert not any(modality == "audio" for modality, _ in found)


def test_neighbours_that_change_ids_are_found() -> None:
    uti = plain_uti(audio=Gossip(), batch_size=2)
    found = failed(audit(uti, reopen=lambda: plain_uti(audio=Gossip(), batch_size=2)))
    assert ("audio", "same ids in a batch") in found
    assert ("audio", "same ids again") not in found


def test_a_decoder_that_knows_more_than_the_ids_is_found() -> None:
    found = failed(audit(plain_uti(image=Memory()), reopen=lambda: plain_uti(image=Memory())))
    assert found == {("image", "ids and metadata suffice, through JSON")}


def test_sounds_that_are_not_finite_are_found() -> None:
    result = audit(plain_uti(audio=Broken()))
    assert ("audio", "decodes to the original's shape") in failed(result)
    json.dumps(result.report, allow_nan=False)
    assert result.report["figures"]["audio"]["snr_db"]["mean"] is None


def test_sounds_that_come_back_short_are_found() -> None:
    assert ("audio", "decodes to the original's shape") in failed(audit(plain_uti(audio=Short())))


def test_ids_that_their_own_decoder_refuses_are_found() -> None:
    class Picky(Worse):
        def decode(self, codes: Any) -> Any:
            raise TokenError("These codes are not to my taste.", "taste")

    result = audit(plain_uti(image=Picky()))
    assert ("image", "decodes to the original's shape") in failed(result)
    assert any("not to my taste" in line for line in result.failures)
    assert result.report["figures"]["image"]["psnr_db"]["mean"] is None


def test_a_second_tokenizer_of_another_space_is_refused() -> None:
    class Renamed(Worse):
        weights_sha256 = "0" * 64

    with pytest.raises(TokenSpaceError, match="opened anew"):
        audit(reopen=lambda: plain_uti(image=Renamed()))


def test_sizes_that_changed_after_loading_are_found() -> None:
    uti = plain_uti()
    uti.audio_codec.codebook_sizes = (16, 17)
    uti.image_tokenizer.grid = (5, 4)
    result = audit(uti, images={}, sounds={})
    name = "the loaded tokenizer has the sizes of the token space"
    assert {("audio", name), ("image", name)} <= failed(result)
    assert any("(16, 17)" in line for line in result.failures)


def test_clamped_ids_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    uti = plain_uti()
    span, decode = uti.token_space.range_of("image"), uti.decode_image

    def clamped(ids: Any, metadata: Any = None, **more: Any) -> Any:
        return decode(np.resize(np.clip(ids, span.first, span.last), 16), metadata, **more)

    monkeypatch.setattr(uti, "decode_image", clamped)
    result = audit(uti)
    assert failed(result) == {("image", "refuses what is no image")}
    assert "an id above the range" in result.failures[0]
    assert "an id too few" in result.failures[0]


def test_text_that_does_not_come_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    uti = plain_uti()
    monkeypatch.setattr(uti, "decode_text", lambda ids: LosslessText.decode(uti.text_tokenizer, list(ids)).lower())
    assert failed(audit(uti, texts=["Shout"])) == {("text", "comes back as it was")}


def test_a_tokenizer_that_can_not_keep_text_is_found() -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "red": 2}, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    text = LosslessText(PreTrainedTokenizerFast(tokenizer_object=words), 10, "words")
    uti = UnifiedTokenizer(UTIConfig(text=TextConfig(tokenizer="words")), text)
    result = audit_uti(uti, texts=["a red heart"])
    assert ("text", "every text can be encoded") in failed(result)
    assert "can't keep this text" in result.failures[0]


def test_what_the_policy_refuses_is_listed() -> None:
    result = audit(plain_uti(silence="refuse"), reopen=lambda: plain_uti(silence="refuse"))
    assert result.passed
    assert [(entry["name"], entry["reason"]) for entry in result.report["refused"]["audio"]] == [
        ("silent.wav", "audio_silent")
    ]


def test_nothing_to_check_is_not_a_pass() -> None:
    result = audit(images={}, sounds={"silent.wav": plain_sounds()["silent.wav"]})
    assert failed(result) == {("image", "there is something to check")}


def test_a_space_of_text_alone() -> None:
    text = LosslessText(tiny_tokenizer(), 384, "tiny")
    uti = UnifiedTokenizer(UTIConfig(text=TextConfig(tokenizer="tiny")), text)
    result = audit_uti(uti, images=plain_pictures(), sounds=plain_sounds(), texts=TEXTS)
    assert result.passed
    assert set(result.report["figures"]) == {"text"}
    assert result.report["figures"]["text"]["characters"] == sum(map(len, TEXTS))


def test_hard_texts_are_always_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    uti = plain_uti()
    seen: list[str] = []
    encode = uti.encode_text

    def watched(text: str) -> list[int]:
        seen.append(text)
        return encode(text)

    monkeypatch.setattr(uti, "encode_text", watched)
    audit(uti, texts=[])
    assert set(HARD_TEXTS) <= set(seen)


def test_half_characters_must_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    uti = plain_uti()
    encode = uti.encode_text
    monkeypatch.setattr(uti, "encode_text", lambda text: encode(text.encode("utf-8", "replace").decode()))
    assert ("text", "refuses half a character") in failed(audit(uti))


def test_progress_tells_what_is_done() -> None:
    said: list[str] = []
    audit(progress=said.append)
    assert "text" in said
    assert "image wide.png" in said


# Gates --------------------------------------------------------------------------------------------------------


def through_json(report: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(report))


def test_the_gates_are_those_that_were_agreed() -> None:
    limits = {gate.figure: gate.limit(20.0) for gate in GATES}
    assert limits == pytest.approx({"psnr_db": 19.5, "ssim": 19.98, "snr_db": 19.0, "log_mel_l1": 21.0})
    assert {gate.figure for gate in GATES if not gate.higher_is_better} == {"log_mel_l1"}


def test_the_same_again_passes_every_gate(good: UTIAudit) -> None:
    again = audit(baseline=through_json(good.report))
    assert again.passed
    assert [gate["name"] for gate in again.report["gates"]] == ["PSNR", "SSIM", "SNR", "log-mel L1"]
    assert all(gate["value"] == gate["baseline"] for gate in again.report["gates"])
    assert again.report["baseline_sha256"] is not None


def test_worse_pictures_and_sounds_fail_the_gates(good: UTIAudit) -> None:
    def worse() -> UnifiedTokenizer:
        return plain_uti(image=Worse(), audio=Noisy())

    result = audit(worse(), reopen=worse, baseline=through_json(good.report))
    assert not result.passed
    assert failed(result) == set(), "every check holds"
    assert {gate["name"] for gate in result.report["gates"] if not gate["passed"]} >= {"PSNR", "SNR", "log-mel L1"}
    assert any(line.startswith("PSNR: ") and "is asked for" in line for line in result.failures)


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.figure)
def test_each_gate_stands_where_it_should(good: UTIAudit, gate: Any) -> None:
    for shift, passes in ((0.99, True), (1.01, False)):
        baseline = through_json(good.report)
        mean = good.report["figures"][gate.modality][gate.figure]["mean"]
        moved = mean / (1 + 0.05 * shift) if gate.factor != 1 else mean - gate.offset * shift
        baseline["figures"][gate.modality][gate.figure]["mean"] = moved
        result = audit(baseline=baseline)
        verdicts = {entry["figure"]: entry["passed"] for entry in result.report["gates"]}
        assert verdicts == {**dict.fromkeys(verdicts, True), gate.figure: passes}
        assert result.passed is passes


def test_figures_that_only_one_audit_has_fail(good: UTIAudit) -> None:
    baseline = through_json(good.report)
    baseline["figures"]["image"]["ssim"]["mean"] = None
    result = audit(baseline=baseline)
    assert [gate["name"] for gate in result.report["gates"] if not gate["passed"]] == ["SSIM"]
    silent = {"silent.wav": plain_sounds()["silent.wav"]}
    first = audit(sounds=silent)
    again = audit(sounds=silent, baseline=through_json(first.report))
    assert again.passed, "SNR in neither"


def test_a_baseline_of_another_token_space_is_refused(good: UTIAudit) -> None:
    class Renamed(Worse):
        weights_sha256 = "0" * 64

    with pytest.raises(TokenSpaceError, match=r"(?s)The baseline has another token space.*weights_sha256"):
        audit(plain_uti(image=Renamed()), reopen=None, baseline=through_json(good.report))


def test_a_baseline_of_other_items_is_refused(good: UTIAudit) -> None:
    pictures = dict(list(plain_pictures().items())[:2])
    with pytest.raises(GateError, match=r"made with other items \(image\)"):
        audit(images=pictures, baseline=through_json(good.report))
    with pytest.raises(GateError, match=r"other items \(text\)"):
        audit(texts=TEXTS[::-1], baseline=through_json(good.report))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda report: report.clear(),
        lambda report: report.update(format=2),
        lambda report: report.update(figures=3),
        lambda report: report["figures"].update(image=None),
        lambda report: report["figures"]["audio"].pop("snr_db"),
        lambda report: report["figures"]["audio"].update(snr_db={"mean": "high"}),
        lambda report: report.update(token_space=None),
        lambda report: report["token_space"].pop("ranges"),
        lambda report: report.update(items_sha256=None),
    ],
)
def test_what_is_no_baseline_is_refused(good: UTIAudit, spoil: Any) -> None:
    baseline = through_json(good.report)
    spoil(baseline)
    with pytest.raises(GateError, match="The baseline"):
        audit(baseline=baseline)


def test_errors_of_the_tokenizer_itself_are_not_hidden() -> None:
    """A failure that is no TokenError is a bug, and stops the audit."""

    class Crash(Worse):
        def encode(self, pixels: Any) -> Any:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        audit(plain_uti(image=Crash()))
    assert issubclass(TokenError, Exception)
