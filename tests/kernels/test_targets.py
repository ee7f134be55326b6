"""What is read from binaries: on texts with known answers, and on kernels compiled for every target, bad ones among them."""

import re
from pathlib import Path

import pytest
import torch

from moesaic.kernels import inspection, roofline, targets, tiles
from moesaic.kernels.inspection import TARGETS, Row, jump, loops, parse_amdgcn, parse_sass

# Twice around: the outer loop 2-10 holds the inner one 3-6, which waits in a block that was moved behind the end.
SASS = """
        Function : k
.text.k:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   LDG.E R5, desc[UR4][R2.64] ;
.L_x_0:
        /*0030*/              @!P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24 ;
        /*0050*/                   {HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24, gsb0 ;
        /*0060*/               @P1 BRA `(.L_x_0) ;
        /*0070*/                   STL [R1+0x4], R3 ;
        /*0080*/                   LDL.LU R3, [R1+0x4] ;
        /*0090*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00a0*/                   BRA.U UP0, `(.L_x_1) ;
        /*00b0*/                   UTMALDG.2D [UR8], [UR4] ;
        /*00c0*/                   EXIT ;
.L_x_3:
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0 ;
        /*00e0*/               @P0 BRA `(.L_x_2) ;
        /*00f0*/                   BRA `(.L_x_3) ;
.L_x_4:
        /*0100*/                   BRA `(.L_x_4);
"""

AMDGCN = """
k:
\tbuffer_load_dwordx4 v[6:9], v15, s[24:27], 0 offen
\ts_cbranch_scc1 .LBB0_2
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tglobal_load_ushort v127, v[94:95], off
\tv_mfma_f32_32x32x8_bf16 v[16:31], v[92:93], v[48:49], v[16:31]
\ts_cbranch_scc0 .LBB0_1
.LBB0_2:                                ; %Flow
\tglobal_store_dwordx4 v[0:1], v[2:5], off
\tscratch_store_dword off, v3, s32
\tglobal_atomic_add_f32 v0, v1, s[0:1]
\ts_endpgm
.Lfunc_end0:
    .private_segment_fixed_size: 8
    .sgpr_spill_count: 0
    .vgpr_count:     137
    .vgpr_spill_count: 2
"""


def test_sass() -> None:
    code = parse_sass(SASS)
    assert len(code.instructions) == 17 and code.labels[".L_x_3"] == 13
    assert inspection.nvidia_figures(code, "REG:94 STACK:0") == {
        "registers": 94, "spills": 2, "tma": 1, "wide": 2, "accesses": 3,
    }  # fmt: skip
    assert {frozenset(body) for body in loops(code)} == {
        frozenset({3, 4, 5, 6, 13, 14, 15}), frozenset({*range(2, 11), 13, 14, 15}), frozenset({13, 14, 15}), frozenset({16}),
    }  # fmt: skip
    # Two warp groups of 8 warps each do 2 products of 64x128x16 a turn; 7 instructions of 8 warps on 4 schedulers.
    assert inspection.main_loop(code, "sm_90a", 8, 0.0) == (2 * 2 * 64 * 128 * 16 / 2048, 7 * 8 / 4)


def test_amdgcn() -> None:
    code = parse_amdgcn(AMDGCN)
    assert inspection.amd_figures(code, AMDGCN) == {
        "registers": 137, "spills": 8, "tma": 0, "wide": 2, "accesses": 3,
    }  # fmt: skip
    # 3 instructions of 4 warps, each scheduler one of them every 4 cycles.
    assert inspection.main_loop(code, "gfx942", 4, 0.0) == (4 * 32 * 32 * 8 / 1024, 3 * 4)
    assert len(inspection.float_atomics("\n".join(code.instructions))) == 1


@pytest.mark.parametrize(
    ("instruction", "goes"),
    [
        ("BRA `(.L_x_3)", (".L_x_3", False)),
        ("@!P0 BRA `(.L_x_3)", (".L_x_3", True)),
        ("BRA.U !UP1, `(.L_x_3)", (".L_x_3", True)),
        ("BRA.DIV UR4, `(.L_x_3)", (".L_x_3", True)),
        ("EXIT", (None, False)),
        ("@P0 EXIT", (None, True)),
        ("s_cbranch_execz .LBB0_8", (".LBB0_8", True)),
        ("s_branch .LBB0_8", (".LBB0_8", False)),
        ("s_endpgm", (None, False)),
        ("IADD3 R1, R2, R3, RZ", (None, True)),
    ],
)
def test_jumps(instruction: str, goes: tuple[str | None, bool]) -> None:
    assert jump(instruction) == goes


@pytest.mark.parametrize(
    ("target", "instruction", "name", "macs"),
    [
        ("sm_90a", "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24", "wgmma 64x256x16", 64 * 256 * 16),
        ("sm_90a", "QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR16], R24", "wgmma 64x128x32", 64 * 128 * 32 / 2),
        ("sm_90a", "HGMMA.64x128x8.F32.TF32 R24, gdesc[UR16], R24", "wgmma 64x128x8", 64 * 128 * 8 * 2),
        ("sm_90a", "HMMA.16816.F32.BF16 R4, R8, R2, R4", "mma 16x8x16", 16 * 8 * 16),
        ("sm_100a", "UTCHMMA gdesc[UR6], gdesc[UR12], tmem[UR9], tmem[UR32]", "tcgen05 HMMA", 1000.0),
        ("sm_100a", "UTCQMMA gdesc[UR6], gdesc[UR12], tmem[UR9], tmem[UR32]", "tcgen05 QMMA", 500.0),
        ("gfx942", "v_mfma_f32_32x32x8_bf16 v[0:15], v[2:3], v[4:5], v[0:15]", "MFMA 32x32x8 bf16", 32 * 32 * 8),
        (
            "gfx942",
            "v_mfma_f32_32x32x16_fp8_fp8 v[0:15], v[2:3], v[4:5], v[0:15]",
            "MFMA 32x32x16 fp8_fp8",
            32 * 32 * 8,
        ),
        ("gfx950", "v_mfma_f32_16x16x4_f32 v[0:3], v4, v5, v[0:3]", "MFMA 16x16x4 f32", 16 * 16 * 4 * 16),
    ],
)
def test_matrix_instructions(target: str, instruction: str, name: str, macs: float) -> None:
    found = inspection.matrix_instruction(instruction, target, 1000.0)
    assert found and found[:2] == (name, macs / TARGETS[target].macs)
    assert inspection.matrix_instruction("IMAD R1, R2, R3, R4", target) is None


def test_peak_rates_agree_with_the_instructions() -> None:
    """The published rate is processors * macs * 2 at a clock between 1.7 and 2.5 GHz, as these parts have."""
    for target in TARGETS.values():
        assert 1.7 < target.tflops * 1e3 / (target.processors * target.macs * 2) < 2.5
    for name, target in TARGETS.items():
        with tiles.meta_is(name):
            assert tiles.processors(torch.device("meta")) == target.processors


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "columns", "expected"),
    [
        ("sm_90a", 128, 0, 8, 0, 16 / 64),  # 128 registers: 2 blocks of 8 warps
        ("sm_90a", 32, 0, 4, 0, 1.0),
        ("sm_90a", 40, 113 * 1024, 4, 0, 8 / 64),  # with its reserved KiB, two blocks fill the 228
        ("sm_90a", 255, 100, 8, 0, 8 / 64),
        ("sm_100a", 32, 0, 4, 256, 8 / 64),
        ("gfx942", 137, 49152, 8, 0, 8 / 32),  # 3 warps a scheduler by registers, one block by LDS
        ("gfx942", 128, 0, 4, 0, 16 / 32),
        ("gfx950", 512, 0, 4, 0, 4 / 32),
    ],
)
def test_occupancy(target: str, registers: int, shared: int, warps: int, columns: int, expected: float) -> None:
    assert inspection.occupancy(target, registers, shared, warps, columns) == expected


def test_faults() -> None:
    good = Row("sm_90a", limit=100, shared=100, matrix="wgmma 64x128x16", product=True)
    assert good.faults() == [] and good.line().startswith("ok")
    for change, words in [
        ({"spills": 3}, "3 register spills"),
        ({"shared": 101}, "101 bytes of shared memory"),
        ({"matrix": "mma 16x8x16"}, "no wgmma instruction, but mma"),
        ({"matrix": ""}, "no wgmma instruction, but none"),
        ({"missing": "v_mfma_scale_"}, "no instruction v_mfma_scale_"),
        ({"float_atomics": 1}, "atomic operations on floats"),
        ({"error": "ValueError: x"}, "ValueError: x"),
    ]:
        bad = Row(**{**vars(good), **change})
        assert words in "; ".join(bad.faults()) and bad.line().startswith("FAILED")


def test_products_of_few_bits() -> None:
    fp8 = "%1 = tt.dot %a, %b, %c : tensor<128x128xf8E4M3FN> * tensor<128x128xf8E4M3FN> -> tensor<128x128xf32>"
    for target, right, wrong in [
        ("sm_90a", "wgmma.mma_async.m64n128k32.f32.e4m3.e4m3", "wgmma.mma_async.m64n128k16.f32.bf16.bf16"),
        ("sm_100a", "tcgen05.mma.cta_group::1.kind::f8f6f4 [%r1]", "tcgen05.mma.kind::f16 [%r1]"),
        ("gfx942", "v_mfma_f32_32x32x16_fp8_fp8 v[0:15]", "v_mfma_f32_32x32x8_bf16_1k v[0:15]"),
        ("gfx950", "v_mfma_f32_32x32x64_f8f6f4 v[0:15]", "v_mfma_f32_32x32x16_bf16 v[0:15]"),
    ]:  # fmt: skip
        missing = inspection.missing_instruction
        assert not missing(fp8, right, target) and missing(fp8, wrong, target)
        assert not missing(fp8.replace("f8E4M3FN", "bf16"), wrong, target)
    scaled = (
        "%1 = tt.dot_scaled %a scale %s, %b scale %t, %c lhs = e2m1 rhs = e2m1 {fastMath = false} : tensor<128x64xi8>"
    )
    for target, right, wrong in [
        ("sm_100a", "tcgen05.mma.kind::mxf4.block_scale.scale_vec::2X [%r1]", "tcgen05.mma.kind::f16 [%r1]"),
        ("gfx950", "v_mfma_scale_f32_32x32x64_f8f6f4 v[0:15]", "v_mfma_f32_32x32x64_f8f6f4 v[0:15]"),
    ]:  # fmt: skip
        assert not missing(scaled, right, target) and missing(scaled, wrong, target)
    slow, fast = (
        inspection.matrix_instruction(f"v_mfma_scale_f32_32x32x64_f8f6f4 v[0:15], v[1:4]{kind}", "gfx950")
        for kind in ("", " op_sel_hi:[0,0,0] cbsz:4 blgp:4")
    )
    assert slow and fast and slow[0] == "MFMA 32x32x64 f8f6f4 scaled" and slow[1] == 2 * fast[1]


def test_compiled() -> None:
    rows = {(row.target, row.case): row for row in targets.compile_all(["tests.kernels.samples"], TARGETS, 1)}
    assert len(rows) == 3 * len(TARGETS) + 2
    for target in TARGETS:
        good = rows[target, "good"]
        assert good.faults() == [] and good.matrix.startswith(TARGETS[target].matrix) and good.product
        assert 0.5 < good.share <= 1 and good.registers > 60 and good.wide > 0
        assert any("atomic operations on floats" in fault for fault in rows[target, "atomic"].faults())
        assert any("nobody is not defined" in fault for fault in rows[target, "broken"].faults())
    for target in ("sm_90a", "gfx942"):
        assert any("register spills" in fault for fault in rows[target, "spills"].faults())


def test_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x: begin -->\nold\n<!-- x: end -->\nafter\n")
    table = inspection.table([Row("sm_90a", "b", "c", registers=7), Row("gfx942", "a", "c", error="broke")])
    targets.write_page(page, "x", table)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.index("| a | c | gfx942 | broke |") < text.index("| b | c | sm_90a | 7 |")
    with pytest.raises(ValueError, match="has no lines <!-- y: begin -->"):
        targets.write_page(page, "y", table)


def test_page_of_the_repository_is_current() -> None:
    """Every case that is compiled has its row in docs/kernels.md, and no other has; the least times are those computed now."""
    page = (Path(__file__).parents[2] / "docs/kernels.md").read_text()
    listed = set(re.findall(r"^\| (\w+\.\w+) \| (.*?) \| (\w+) \| \d", page, re.MULTILINE))
    assert listed and listed == set(targets.listed(targets.modules(), TARGETS))
    assert roofline.table() in page


def test_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Exit codes, and that a page is written when everything was compiled, and then only."""
    rows = [Row("sm_90a", "a.k", "c", limit=1), Row("gfx942", "a.k", "c", limit=1)]
    monkeypatch.setattr(targets, "compile_all", lambda *arguments: iter(rows))
    page = tmp_path / "page.md"
    empty = "".join(f"<!-- {name}: begin -->\n<!-- {name}: end -->\n" for name in ("make kernels", "roofline"))
    page.write_text(empty)
    assert targets.main(["--page", str(page), "--target", "sm_90a"]) == 0
    assert page.read_text() == empty
    assert targets.main(["--page", str(page)]) == 0
    assert "| a.k | c | gfx942 |" in page.read_text() and roofline.table() in page.read_text()
    rows.append(Row("gfx950", "a.k", "c", limit=1, spills=4))
    assert targets.main([]) == 1
    assert "FAILED gfx950 a.k [c]: 4 register spills" in capsys.readouterr().out
    rows.clear()
    assert targets.main([]) == 1  # nothing compiled is no success
