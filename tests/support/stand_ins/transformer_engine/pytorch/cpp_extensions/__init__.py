"""Stand-in for transformer_engine 2.20.2, transformer_engine/pytorch/cpp_extensions/gemm.py."""

import torch


def general_grouped_gemm(
    A,
    B,
    out,
    quantization_params,
    out_dtype,
    layout="TN",
    m_splits=None,
    gelu=False,
    grad=False,
    accumulate=False,
    bias=None,
    use_bias=False,
    use_split_accumulator=False,
    D_dtype=None,
    single_output=False,
):
    """Write one product a group into `out`; return (out, bias, pre-GELU).

    Layouts are of column-major BLAS. For row-major tensors: TN is B A^T, NN is B A, NT is B^T A. With single_output the
    products stand one after another in out[0], m_splits rows each.
    """
    assert not any([gelu, accumulate, use_bias, bias, D_dtype]), "not part of the stand-in"
    assert len(A) == len(B) == len(quantization_params) == len(m_splits) > 0
    assert all(quantizer is None for quantizer in quantization_params)
    assert all(isinstance(size, int) for size in m_splits)
    # The real one hands bare pointers to cuBLAS: a strided tensor would be read as garbage, without an error.
    assert all(tensor.is_contiguous() for tensor in [*A, *B, *out])
    assert {tensor.dtype for tensor in [*A, *B, *out]} == {out_dtype}
    blocks = list(out[0].split(m_splits)) if single_output else out
    assert len(blocks) == len(A)
    for a, b, block in zip(A, B, blocks, strict=True):
        torch.matmul(b.t() if layout[1] == "T" else b, a.t() if layout[0] == "T" else a, out=block)
    return out, [torch.Tensor()] * len(A), [torch.Tensor()] * len(A)
