"""What `tokenize.py` measures; see there for how it is run.

Real files are written first: pictures (PNG, 64 × 64), sounds (WAV, 16 kHz, 2 s) and words. All ratios are of one
run:

- overhead: CPU seconds of the whole pipeline (manifest, decoding, codecs, tars, hashes) over those of calling the
  same codecs on the same items, decoded and prepared beforehand, in a bare loop; turn about, the least of each;
- scaling: records per second of two worker processes over one, from the moment that every worker has written a shard;
- memory: peak of all processes together with ten times the records. Most of those are text, so that it ends today.
"""

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import soundfile
import torch
import yaml
from measuring import last_json_line, show, write_result
from PIL import Image

from qwen3_vlm.data.tokenize import open_worker, tokenize_manifest
from qwen3_vlm.data.tokenize_plan import Plan, make_plan
from qwen3_vlm.data.worker_pool import WorkerPool
from qwen3_vlm.fingerprint import fingerprint_file
from qwen3_vlm.tokenization.pictures import fit_picture
from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer
from qwen3_vlm.tokenization.waveforms import prepare_sound

SCRIPT = Path(__file__).with_name("tokenize.py")
RESULT = Path(__file__).parent / "results" / "tokenize.json"
BASES = Path(__file__).parent.parent / "qwen3_vlm" / "demo" / "bases"
SETTINGS = ("records", "files", "batch_size", "shard_records", "rounds", "workers", "memory_records", "only")
PARTS = ("overhead", "scaling", "memory")
SAMPLE_SECONDS = 0.02
WORDS = ["a", "red", "heart", "left", "of", "a", "small", "dog", "on", "a", "white", "background"]


def main() -> None:
    options = parse_options()
    if options.memory_run is not None:
        print(json.dumps(peak_memory(options.memory_run, options.work)))
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        uti_file = write_uti(work, options.batch_size)
        manifest = write_data(work / "data", options.records, files=options.files)
        result: dict[str, Any] = {
            "settings": {name: value for name, value in vars(options).items() if name in SETTINGS}
        }
        if "overhead" in options.only:
            result["overhead"] = measure_overhead(work, manifest, uti_file, options.rounds, options.batch_size)
        if "scaling" in options.only:
            result["scaling"] = measure_scaling(work, manifest, uti_file, options.workers, options.shard_records)
        if "memory" in options.only:
            result["memory"] = measure_memory(work, uti_file, options.memory_records)
    report(result)
    write_result(options.out, result)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The cost of tokenizing beyond the codecs.")
    parser.add_argument("--records", type=int, default=256, help="records with picture, sound and text")
    parser.add_argument("--files", type=int, default=96, help="different pictures and sounds")
    parser.add_argument("--batch-size", type=int, default=8, help="items per call of a codec, on both sides")
    parser.add_argument("--shard-records", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="turns of pipeline and bare loop")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--memory-records", type=int, default=5_000, help="and ten times as many")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--memory-run", type=Path, default=None, help=argparse.SUPPRESS)  # a manifest: we are a child
    parser.add_argument("--work", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args()


def write_uti(folder: Path, batch_size: int) -> Path:
    """The demo's tokenizers."""
    audio = {"type": "dac", "source": str(BASES / "audio_codec"), "clip_seconds": 2.0, "batch_size": batch_size}
    config = {
        "text": {"tokenizer": str(BASES / "text"), "name": "demo"},
        "image": {"type": "janus_vqvae", "source": str(BASES / "image_tokenizer"), "batch_size": batch_size},
        "audio": audio,
    }
    path = folder / "uti.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def write_data(folder: Path, records: int, *, files: int, media_every: int = 1, name: str = "manifest.jsonl") -> Path:
    """A manifest over a few files; of `media_every` records one has a picture and a sound, the others text alone."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(files):
        pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        soundfile.write(folder / f"{number}.wav", generator.uniform(-0.3, 0.3, 32_000).astype(np.float32), 16_000)
    path = folder / name
    with path.open("w") as file:
        for number in range(records):
            has = number % media_every == 0
            media = {"image": f"{number % files}.png", "audio": f"{number % files}.wav"} if has else {}
            text = " ".join(WORDS[(number + place) % len(WORDS)] for place in range(12))
            tree = {"id": f"r{number}", "source": "noise", "modalities": media, "text": text, "task": "i2t"}
            file.write(json.dumps(tree) + "\n")
    return path


# Overhead --------------------------------------------------------------------------------------------------


def measure_overhead(work: Path, manifest: Path, uti_file: Path, rounds: int, batch_size: int) -> dict[str, Any]:
    """CPU and wall seconds of both ways. CPU seconds hardly depend on what else the machine does."""
    uti = UnifiedTokenizer.open(uti_file, download=False)
    bare_loop = prepare_bare_loop(uti, manifest, batch_size)
    plan = plan_of(work / "overhead", manifest, uti)
    pipeline = functools.partial(run_units, plan)
    timings: dict[str, list[tuple[float, float]]] = {"bare": [], "pipeline": []}
    bare_loop()  # warm
    _worker(plan.out)  # loading the tokenizers is no part of either
    for _ in range(rounds):
        for name, call in (("bare", bare_loop), ("pipeline", pipeline)):
            timings[name].append(timed(call))
    best = {
        name: {"cpu": min(t[0] for t in found), "wall": min(t[1] for t in found)} for name, found in timings.items()
    }
    ratios = {kind: best["pipeline"][kind] / best["bare"][kind] - 1 for kind in ("cpu", "wall")}
    return {"records": plan.records, "seconds": best, "all_seconds": timings, "overhead": ratios}


def prepare_bare_loop(uti: UnifiedTokenizer, manifest: Path, batch_size: int) -> Callable[[], None]:
    """Everything decoded and brought into the codecs' form beforehand; what is left is calls of full batches."""
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    root = manifest.parent
    image, audio = uti._image_parts(), uti._audio_parts()
    pixels, clips = [], []
    for line in lines:
        picture = Image.open(root / line["modalities"]["image"]).convert("RGB")
        pixels.append(fit_picture(picture, image[0].resolution, image[1]).pixels)
        sound, rate = soundfile.read(root / line["modalities"]["audio"], dtype="float32")
        clips += prepare_sound(sound, rate, audio[2], audio[1]).clips
    texts = [line["text"] for line in lines]

    def loop() -> None:
        for text in texts:
            uti.encode_text(text)
        for items, encode in ((pixels, image[0].encode), (clips, audio[0].encode)):
            for start in range(0, len(items), batch_size):
                encode(np.stack(items[start : start + batch_size]))

    return loop


def plan_of(out: Path, manifest: Path, uti: UnifiedTokenizer, shard_records: int = 256) -> Plan:
    """A folder that workers can open, and its plan."""
    (out / "shards").mkdir(parents=True, exist_ok=True)
    uti.save(out)
    settings = {
        "limits": {"max_image_pixels": 50_000_000},
        "uti_sha256": fingerprint_file(out / "uti.yaml"),
        "token_space_sha256": uti.sha256,
    }
    return make_plan(manifest, out, fractions={}, shard_records=shard_records, settings=settings)


@functools.cache
def _worker(out: Path) -> UnifiedTokenizer:
    return UnifiedTokenizer.open(out, download=False)


def run_units(plan: Plan) -> None:
    """The pipeline in this process, from the lines of the manifest to shards on disk."""
    from qwen3_vlm.data.tokenize_unit import tokenize_unit

    uti = _worker(plan.out)
    make_plan(
        plan.manifest,
        plan.out,
        fractions={},
        shard_records=plan.settings["shard_records"],
        settings={name: plan.settings[name] for name in ("limits", "uti_sha256", "token_space_sha256")},
    )
    for unit in plan.units():
        tokenize_unit(plan, unit, uti)


def timed(call: Callable[[], None]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


# Scaling ---------------------------------------------------------------------------------------------------


def measure_scaling(work: Path, manifest: Path, uti_file: Path, workers: int, shard_records: int) -> dict[str, Any]:
    """Records per second once every worker has written its first shard; loading the tokenizers is told apart."""
    uti = UnifiedTokenizer.open(uti_file, download=False)
    rates, starts = {}, {}
    for count in (1, workers, 1, workers):
        plan = plan_of(work / f"scaling-{count}-{len(rates)}", manifest, uti, shard_records)
        rate, start = pool_rate(plan, count)
        rates.setdefault(str(count), []).append(rate)
        starts.setdefault(str(count), []).append(start)
    best = {count: max(found) for count, found in rates.items()}
    ratio = best[str(workers)] / best["1"]
    return {"records_per_second": rates, "start_seconds": starts, "ratio": ratio, "cores": os.cpu_count()}


def pool_rate(plan: Plan, count: int) -> tuple[float, float]:
    begin, finished = time.perf_counter(), []
    with WorkerPool[Any](count, functools.partial(open_worker, plan, False)) as pool:
        for event in pool.run(plan.units()):
            if event.done:
                finished.append((time.perf_counter(), event.task.records))  # noqa: PERF401 - the time is that of the event
    start, _ = finished[count - 1]
    end, _ = finished[-count]  # until then all of them have work
    records = sum(records for when, records in finished if start < when <= end)
    return records / (end - start), start - begin


# Memory ----------------------------------------------------------------------------------------------------


def measure_memory(work: Path, uti_file: Path, records: int) -> dict[str, Any]:
    """Peaks of runs of their own, each in a child of ours."""
    peaks = {}
    for count in (records, 10 * records):
        manifest = write_data(work / "memory", count, files=8, media_every=100, name=f"{count}.jsonl")
        command = [sys.executable, str(SCRIPT), "--memory-run", str(manifest), "--work", str(uti_file.parent)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        peaks[str(count)] = last_json_line(done.stdout)
    few, many = (peaks[str(count)]["peak_bytes"] for count in (records, 10 * records))
    return {"runs": peaks, "ratio": many / few, "bytes_per_more_record": (many - few) / (9 * records)}


def peak_memory(manifest: Path, work: Path) -> dict[str, Any]:
    """Tokenize with two workers and watch all processes together."""
    with watch_memory() as peak:
        result = tokenize_manifest(
            manifest, work / f"memory-{manifest.stem}", work / "uti.yaml", workers=2, shard_records=500, download=False
        )
    assert result.total is not None
    return {"records": result.total.records, "peak_bytes": peak[0], "parent_bytes": peak[1]}


@contextlib.contextmanager
def watch_memory() -> Iterator[list[int]]:
    """Largest sum of resident memory of this process and its children, and its own largest, in bytes."""
    peak, stop, me = [0, 0], threading.Event(), psutil.Process()

    def watch() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            sizes = [me.memory_info().rss]
            for child in me.children():
                with contextlib.suppress(psutil.Error):
                    sizes.append(child.memory_info().rss)
            peak[0], peak[1] = max(peak[0], sum(sizes)), max(peak[1], sizes[0])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def report(result: dict[str, Any]) -> None:
    rows: list[tuple[str, str]] = []
    if overhead := result.get("overhead"):
        rows.append(("pipeline over bare loop, CPU", f"{100 * overhead['overhead']['cpu']:+.1f} %  (≤ 10 %)"))
        rows.append(("pipeline over bare loop, wall", f"{100 * overhead['overhead']['wall']:+.1f} %"))
    if scaling := result.get("scaling"):
        rows.append(("two processes over one", f"{scaling['ratio']:.2f} ×  (≥ 1.7)"))
    if memory := result.get("memory"):
        rows.append(("peak memory, 10 × the records", f"{memory['ratio']:.3f} ×  (≤ 1.1)"))
        rows.append(("bytes per more record", f"{memory['bytes_per_more_record']:,.0f}"))
    show("Tokenizing", rows)
