from __future__ import annotations

import json
from pathlib import Path

import pytest

import edgekit
from edgekit.errors import OutputError
from edgekit.method import Method
from edgekit.output import sha256
from edgekit.records import (
    BENCHMARKS,
    COMPRESSED,
    MANIFEST,
    MODEL,
    Benchmark,
    Benchmarks,
    Compressed,
    FileRecord,
    LayerRecord,
    Manifest,
    Metric,
    OutputProof,
    PrecisionTiming,
    Proof,
    Source,
    Table,
)
from edgekit.report import COLUMNS, summary, write_report
from edgekit.target import load_target


def write(path: Path, record: Table) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(record.model_dump_json())


def compressed_record(folder: Path, **changes: object) -> Compressed:
    """A compressed model in a folder."""
    (folder / MODEL).write_bytes(b"a model")
    record = Compressed(
        edgekit="0.1.0",
        versions={"python": "3.11.7", "onnx": "1.19"},
        source=Source(name="net.pt", kind="pt"),
        target="portable",
        method=Method(calibrator="kld"),
        samples=280,
        held_back=40,
        model_sha256=sha256(folder / MODEL),
        float_metric=Metric(name="top-1", value=0.992),
        simulated_metric=Metric(name="top-1", value=0.99),
        layers=tuple(
            LayerRecord(name=f"conv{i}", op_type="Conv", output_shape=(None, 8, 4, 4), macs=1000 * i, parameters=72)
            for i in range(1, 5)
        ),
        stays_float={"Softmax": 2},
        notes=("calibrated on 280 samples only",),
    ).model_copy(update=changes)
    write(folder / COMPRESSED, record)
    return record


def manifest_record(folder: Path, name: str = "x86-openvino", **changes: object) -> Manifest:
    """An export in a folder."""
    record = Manifest(
        edgekit="0.1.0",
        versions={},
        source=Source(name="net.pt", kind="pt"),
        model_sha256=sha256(folder / MODEL),
        target=name,
        target_rules=load_target("x86-openvino"),
        backend="openvino",
        runtime="openvino 2026.4",
        format="qdq",
        artifact="model.xml",
        artifact_files=("model.xml", "model.bin"),
        files=(
            FileRecord(name="model.onnx", bytes=5000, sha256="0nnx"),
            FileRecord(name="model.xml", bytes=1000, sha256="a"),
            FileRecord(name="model.bin", bytes=2234, sha256="b"),
        ),
        proof=Proof(
            ran_on="openvino 2026.4",
            batch_sizes=(1, 7),
            samples=44,
            agrees=True,
            outputs=(
                OutputProof(
                    name="scores",
                    simulation_sqnr_db=45.61,
                    float_sqnr_db=34.9,
                    simulation_cosine=1,
                    float_cosine=0.99988,
                ),
            ),
            float_top1=0.977,
            simulation_top1=1.0,
            int8_macs_share=0.987,
            int8_source="ran",
            float_layers=("conv1",),
        ),
        metric=Metric(name="top-1", value=0.9875),
        float_metric=Metric(name="top-1", value=0.992),
        metric_source="ran",
        notes=("in float: conv1",),
    ).model_copy(update=changes)
    write(folder / name / MANIFEST, record)
    return record


def timing(label: str, median: float) -> PrecisionTiming:
    return PrecisionTiming(
        label=label,
        median_ms=median,
        p90_ms=median * 1.1,
        p99_ms=median * 1.5,
        ci_low_ms=median * 0.9,
        ci_high_ms=median * 1.2,
        throughput=1000 / median,
        load_ms=12.6,
        peak_rss_bytes=150 * 2**20,
        iterations=700,
        bursts=(median,),
        artifact_bytes=3234,
    )


def benchmark_record(folder: Path, name: str = "x86-openvino", **changes: object) -> Benchmark:
    record = Benchmark(
        target=name,
        graph_sha256="0nnx",
        runtime="openvino 2026.4",
        timings=(timing("f32", 3.0), timing("bf16", 2.0), timing("int8", 1.0)),
        speedup=3.0,
        speedup_low=2.8,
        speedup_high=3.1,
        fastest_float="bf16",
        speedup_over_fastest=2.0,
    ).model_copy(update=changes)
    write(folder / BENCHMARKS, Benchmarks(machine="a CPU, 2 CPUs, Linux", batch_size=1, targets=(record,)))
    return record


def test_the_summary_has_a_row_for_each_target(tmp_path: Path) -> None:
    compressed_record(tmp_path)
    manifest_record(tmp_path)
    benchmark_record(tmp_path)
    [row] = summary(tmp_path)
    assert dict(zip(COLUMNS, row.cells(), strict=True)) == {
        "target": "x86-openvino",
        "where it ran": "ran on openvino 2026.4",
        "bytes": "3,234",
        "accuracy": "98.75 %",
        "drop": "+0.45 points",
        "median ms": "1.000",
        "speed-up": "3.00x",
        "of fastest float": "2.00x bf16",
        "MACs in int8": "98.7 % ran",
    }


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({}, "checked on openvino 2026.4"),
        ({"proof": Proof(ran_on="openvino 2026.4", agrees=False, reason="r")}, "WRONG, do not ship"),
        ({"proof": Proof()}, "built, not run here"),
        ({"model_sha256": "another"}, "stale: export again"),
    ],
)
def test_the_state_says_what_an_export_is_worth(tmp_path: Path, changes: dict[str, object], state: str) -> None:
    compressed_record(tmp_path)
    manifest_record(tmp_path, **changes)
    assert [row.state for row in summary(tmp_path)] == [state]


def test_a_benchmark_without_timings_shows_in_the_state(tmp_path: Path) -> None:
    compressed_record(tmp_path)
    manifest_record(tmp_path)
    benchmark_record(
        tmp_path, timings=(), speedup=None, speedup_over_fastest=None, reason="wrong CPU", remedy="buy one"
    )
    [row] = summary(tmp_path)
    assert (row.state, row.median_ms, row.speedup) == ("checked on openvino 2026.4, not timed here", "", "")
    write_report(tmp_path)
    assert "x86-openvino: not timed: wrong CPU; buy one." in (tmp_path / "report.md").read_text()


def test_noise_is_marked(tmp_path: Path) -> None:
    compressed_record(tmp_path)
    manifest_record(tmp_path)
    benchmark_record(tmp_path, noisy=True, notes=("f32: burst medians differ by 40%",))
    [row] = summary(tmp_path)
    assert (row.speedup, row.speedup_over_fastest) == ("~3.00x", "~2.00x bf16")
    write_report(tmp_path)
    assert "x86-openvino: f32: burst medians differ by 40%" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("changes", "accuracy", "drop"),
    [
        (
            {"metric": Metric(name="map", value=0.4321), "float_metric": Metric(name="map", value=0.44)},
            "0.4321",
            "+0.0079",
        ),
        ({"metric": Metric(name="top-1", value=1.0)}, "100.00 %", "-0.80 points"),
        ({"float_metric": None}, "98.75 %", ""),
        ({"metric_source": "simulated"}, "98.75 % simulated", "+0.45 points"),
        ({"metric": None}, "97.7 % agree", ""),
        ({"metric": None, "proof": Proof(float_top1=0.5)}, "50.0 % agree simulated", ""),
        ({"metric": None, "proof": Proof()}, "", ""),
    ],
)
def test_accuracy_is_the_metric_or_the_next_best_number(
    tmp_path: Path, changes: dict[str, object], accuracy: str, drop: str
) -> None:
    compressed_record(tmp_path)
    manifest_record(tmp_path, **changes)
    [row] = summary(tmp_path)
    assert (row.metric, row.drop) == (accuracy, drop)


def test_without_scores_the_worst_output_counts(tmp_path: Path) -> None:
    outputs = tuple(
        OutputProof(name=name, simulation_sqnr_db=50, float_sqnr_db=ratio, simulation_cosine=None, float_cosine=None)
        for name, ratio in (("boxes", 31.26), ("masks", 22.04), ("count", None))
    )
    compressed_record(tmp_path)
    manifest_record(tmp_path, metric=None, proof=Proof(ran_on="openvino", agrees=True, outputs=outputs))
    assert [row.metric for row in summary(tmp_path)] == ["22.0 dB"]


def test_the_report_tells_all_in_markdown_and_json(tmp_path: Path) -> None:
    compressed = compressed_record(tmp_path)
    manifest = manifest_record(tmp_path)
    benchmark = benchmark_record(tmp_path)
    assert write_report(tmp_path) == tmp_path / "report.md"
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for line in (
        "# net.pt",
        "- compressed for `portable` with int8 weights, int8 activations, 'kld' ranges from 280 samples; "
        "40 more were held back to verify exports with",
        "- edgekit 0.1.0, python 3.11.7, onnx 1.19",
        "- top-1: float 99.20 %, in simulation 99.00 %",
        "- stays float: 2 Softmax",
        "- **note:** calibrated on 280 samples only",
        "### x86-openvino",
        "- `model.xml` (qdq, 3,234 bytes), ran on openvino 2026.4; 44 held-back samples in batches of 1, 7",
        "- output `scores`: 45.6 dB from the simulation, 34.9 dB from float (cosine 0.99988)",
        "- same arg max as float on 97.7 % of the samples",
        "- 98.7 % of the MACs in int8 kernels, as ran",
        "- **note:** in float: conv1",
        "a CPU, 2 CPUs, Linux; batch 1.",
        "| x86-openvino | int8 | 1.000 | 0.900 to 1.200 | 1.100 | 1.500 | 1000 | 13 | 150 | 3,234 |",
        "x86-openvino: int8 is 3.00x f32 (95 %: 2.80 to 3.10), 2.00x the fastest float, bf16.",
        "| `conv4` | Conv | ?x8x4x4 | 4,000 | 40.0 % | 72 |",
    ):
        assert line in text.splitlines(), line
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["compressed"] == compressed.model_dump(mode="json")
    assert document["exports"] == {"x86-openvino": manifest.model_dump(mode="json")}
    assert document["benchmark"]["targets"] == [benchmark.model_dump(mode="json")]


def test_outputs_of_whole_numbers_have_a_share(tmp_path: Path) -> None:
    output = OutputProof(
        name="classes",
        simulation_sqnr_db=None,
        float_sqnr_db=None,
        simulation_cosine=None,
        float_cosine=None,
        simulation_equal=1.0,
        float_equal=0.975,
    )
    compressed_record(tmp_path)
    manifest_record(tmp_path, proof=Proof(ran_on="openvino", agrees=True, outputs=(output,)))
    write_report(tmp_path)
    line = "- output `classes`: 100.0 % equal to the simulation, 97.5 % equal to float"
    assert line in (tmp_path / "report.md").read_text().splitlines()


def test_a_long_network_is_cut(tmp_path: Path) -> None:
    layer = LayerRecord(name="conv", op_type="Conv", output_shape=None, macs=1, parameters=1)
    compressed_record(tmp_path, layers=(layer,) * 230)
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.count("| `conv` |") == 200
    assert text.endswith("... and 30 more.\n")


def test_timings_of_another_graph_are_left_out(tmp_path: Path) -> None:
    compressed_record(tmp_path)
    manifest_record(tmp_path)
    benchmark_record(tmp_path, graph_sha256="before")
    write_report(tmp_path)
    assert [row.median_ms for row in summary(tmp_path)] == [""]
    assert "## Latency" not in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["benchmark"] is None


def test_what_a_killed_export_left_is_no_export(tmp_path: Path) -> None:
    compressed_record(tmp_path)
    manifest_record(tmp_path)
    (tmp_path / "x86-openvino").rename(tmp_path / ".x86-openvino.partial-abc")
    assert summary(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("compress.json", "give the folder that `edgekit compress -o` wrote"),
        ("x86-openvino/manifest.json", "run `edgekit export` again"),
        ("benchmark.json", "run `edgekit benchmark` again"),
    ],
)
@pytest.mark.parametrize(("content", "reason"), [("{", "invalid json"), ('{"edgekit": 3}', "edgekit: |machine: ")])
def test_a_damaged_record_is_named(tmp_path: Path, name: str, remedy: str, content: str, reason: str) -> None:
    compressed_record(tmp_path)
    manifest_record(tmp_path)
    benchmark_record(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(OutputError, match=rf"{name}: cannot be read as an edgekit record \(.*({reason}).*\); {remedy}"):
        write_report(tmp_path)


def test_the_report_of_a_real_run_agrees_with_its_records(exported_once: Path) -> None:
    document = json.loads((exported_once / "report.json").read_text())
    assert document["compressed"] == json.loads((exported_once / "compress.json").read_text())
    assert document["exports"] == {"numpy": json.loads((exported_once / "numpy" / "manifest.json").read_text())}
    assert f"- edgekit {edgekit.__version__}, python " in (exported_once / "report.md").read_text()
