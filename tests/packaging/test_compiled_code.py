"""The readers of compiled code, on code that is short enough to be read here."""

import json

import compiled_code

TTGIR = """
    %s = scf.for %tile = %a to %b step %c : i32 {
      %0 = ttg.async_copy_global_to_local %p, %m : tensor<128x64x!tt.ptr<bf16>> -> <128x64xbf16, #s>
      %1 = ttg.async_copy_global_to_local %q, %n : tensor<128x64x!tt.ptr<bf16>> -> <128x64xbf16, #s>
      %2:2 = scf.for %k = %a to %b step %c iter_args(%x = %y) -> (tensor<128x128xf32>) {
        %3 = ttng.warp_group_dot %l, %r, %x : !ttg.memdesc<128x64xbf16> * !ttg.memdesc<64x128xbf16> -> tensor<128x128xf32>
        ttng.async_tma_copy_global_to_local %d[%i] %t, %u : !tt.tensordesc<128x64xbf16>, !ttg.memdesc<1xi64> -> !ttg.memdesc<128x64xbf16>
        ttng.async_tma_copy_global_to_local %e[%i] %t, %u : !tt.tensordesc<128x64xbf16>, !ttg.memdesc<1xi64> -> !ttg.memdesc<128x64xbf16>
        scf.yield %3 : tensor<128x128xf32>
      }
      %4 = tt.dot %f, %g, %h : tensor<128x16xf16> * tensor<16x32xf16> -> tensor<128x32xf32>
    }
"""

# A loop over steps; the branch at 30 passes over the end of a tile, that at 10 over one load.
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;  /* 0x0 */
        /*0010*/               @P0 BRA 0x30 ;  /* 0x0 */
        /*0020*/                   LDG.E R2, [R4] ;  /* 0x0 */
        /*0030*/              @!P1 BRA 0x80 ;  /* 0x0 */
        /*0040*/                   MUFU.EX2 R2, R2 ;  /* 0x0 */
        /*0050*/                   MUFU.EX2 R3, R3 ;  /* 0x0 */
        /*0060*/                   FADD R2, R2, R3 ;  /* 0x0 */
        /*0070*/                   STG.E [R6], R2 ;  /* 0x0 */
        /*0080*/              @UP2 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;  /* 0x0 */
        /*0090*/               @P3 BRA 0x10 ;  /* 0x0 */
        /*00a0*/                   EXIT ;  /* 0x0 */
"""


def test_loops_with_products_and_what_they_copy():
    inner, outer = compiled_code.product_loops(TTGIR)
    tile = 128 * 64 * 2
    assert inner == {"stages": 2, "inner": 1, "flops": 2 * 128 * 64 * 128, "bytes": 2 * tile}
    assert outer == {"stages": 1, "inner": 0, "flops": 2 * 128 * 16 * 32, "bytes": 2 * tile}


def test_instructions_of_a_step_and_of_a_tile():
    found = compiled_code.counts(SASS)
    assert found["step"] == {"instructions": 4, "mufu": 0, "mma": 1}
    assert found["sometimes"] == {"instructions": 1, "mufu": 0, "mma": 0}
    assert found["tile"] == {"instructions": 4, "mufu": 2, "mma": 0}
    assert found["all"]["instructions"] == 11


def test_what_ptx_tells():
    ptx = """
    wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1}, %rd1, %rd2;
    wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%f1}, %rd1, %rd2;
    cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r38], [%rd2], [%r36];
    cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd2], [%r36];
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];
    ld.global.b8 {%r1}, [%rd1];
    """
    assert compiled_code.wgmma(ptx) == {"64x128": 1, "64x16": 1}
    assert compiled_code.bulk_copies(ptx) == 1  # what is stored is none
    assert compiled_code.asynchronous_copies(ptx) == {16: 1}
    assert compiled_code.global_loads(ptx) == {16: 1, 1: 1}
    assert compiled_code.tensor_core(ptx) == "wgmma"


def test_counts_of_other_kernels_stay(tmp_path):
    path = tmp_path / "counts.json"
    compiled_code.write_counts(path, [{"kernel": "b", "case": "x", "size": 1}])
    compiled_code.write_counts(path, [{"kernel": "a", "case": "x", "size": 2}])
    compiled_code.write_counts(path, [{"kernel": "b", "case": "y", "size": 3}])
    found = [(row["kernel"], row["case"], row["size"]) for row in json.loads(path.read_text())]
    assert found == [("a", "x", 2), ("b", "y", 3)]
