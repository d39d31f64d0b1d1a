//! Checks the tensors of a GGUF header: names, shapes, data types and offsets.
//!
//! `gguf` and this file use each other: they check one format, in two files because of its length.

use std::collections::HashSet;

use super::{Header, SPLIT_COUNT_KEY, Tensor};

/// Maximum number of dimensions of a tensor (`GGML_MAX_DIMS`).
pub(super) const MAX_DIMENSIONS: u32 = 4;

/// Maximum length of a tensor's name in bytes (`GGML_MAX_NAME` without the terminating zero).
const MAX_NAME_BYTES: usize = 63;

/// Alignment of tensors in bytes if the file does not set it.
const DEFAULT_ALIGNMENT: u64 = 32;

/// Minimum alignment in bytes (`TENSOR_ALIGNMENT`). ggml aborts if a tensor in mapped memory has a smaller alignment.
const MIN_ALIGNMENT: i128 = 32;

/// Maximum alignment in bytes: 1 MiB, which is many memory pages.
const MAX_ALIGNMENT: i128 = 1 << 20;

/// Data types that weights cannot have. ggml cannot multiply integers and 64-bit floats. Q8_1 and Q8_K are for
/// activations.
const NON_WEIGHT_TYPES: [u32; 7] = [9, 15, 24, 25, 26, 27, 28];

/// Part of the names of tensors that contain token ids. Some models choose experts by token id.
const TOKEN_ID_TENSORS: &str = "tid2eid";

/// Checks every tensor. `end` is the position after the header; `length` is the size of the file. Both are in bytes.
pub(super) fn check_tensors(header: &Header, end: u64, length: u64) -> Result<(), String> {
    let alignment = alignment(header)?;
    // The first file of a split model may have no tensors.
    if header.tensors.is_empty() && header.value(SPLIT_COUNT_KEY).is_none() {
        return Err("the file has no tensors".to_owned());
    }
    let data = end.next_multiple_of(alignment);
    let mut names = HashSet::new();
    let mut offset = 0_u64;
    for tensor in &header.tensors {
        let name = &tensor.name;
        if name.len() > MAX_NAME_BYTES {
            let length = name.len();
            return Err(format!(
                "the name of tensor `{name}` must be at most {MAX_NAME_BYTES} bytes long (got {length})"
            ));
        }
        if !names.insert(name) {
            return Err(format!("tensor `{name}` is in the file twice"));
        }
        check_type(tensor)?;
        let size = data_size(tensor)?;
        if tensor.offset != offset {
            let got = tensor.offset;
            return Err(format!(
                "tensor `{name}` must start at {offset}, after the previous tensor (got {got})"
            ));
        }
        let end = data.checked_add(offset).and_then(|at| at.checked_add(size));
        if end.is_none_or(|end| end > length) {
            return Err(format!(
                "the file is truncated: its {length} bytes end before the end of tensor `{name}`"
            ));
        }
        offset = (offset + size).next_multiple_of(alignment);
    }
    Ok(())
}

/// Checks that ggml can compute with a tensor of this data type.
fn check_type(tensor: &Tensor) -> Result<(), String> {
    let name = &tensor.name;
    let is_weight = name.ends_with(".weight") || name.ends_with(".bias");
    let data_type = tensor.data_type;
    if is_weight && NON_WEIGHT_TYPES.contains(&data_type) && !name.contains(TOKEN_ID_TENSORS) {
        return Err(format!(
            "tensor `{name}` has data type {data_type}, which weights cannot have"
        ));
    }
    // Vectors: norms, biases and frequencies. ggml's operations accept only 32-bit floats for them, and converters
    // write them so.
    let is_vector = tensor.dimensions.len() <= 1;
    if is_vector && !name.contains(TOKEN_ID_TENSORS) && data_type != 0 {
        return Err(format!(
            "tensor `{name}` must have data type 0, 32-bit floats (got {data_type})"
        ));
    }
    Ok(())
}

fn alignment(header: &Header) -> Result<u64, String> {
    const KEY: &str = "general.alignment";
    let Some(alignment) = header.integer(KEY)? else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    let power = u64::try_from(alignment)
        .ok()
        .filter(|it| it.is_power_of_two());
    let power = power.filter(|_| (MIN_ALIGNMENT..=MAX_ALIGNMENT).contains(&alignment));
    power.ok_or_else(|| {
        format!(
            "`{KEY}` must be a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT} (got {alignment})"
        )
    })
}

/// Returns the size of a tensor's data in bytes.
fn data_size(tensor: &Tensor) -> Result<u64, String> {
    let (name, data_type, shape) = (&tensor.name, tensor.data_type, &tensor.dimensions);
    if shape.contains(&0) {
        return Err(format!(
            "every dimension of tensor `{name}` must be at least 1 (got {shape:?})"
        ));
    }
    let Some((block, bytes)) = block_size(data_type) else {
        return Err(format!(
            "tensor `{name}` has data type {data_type}, which llama.cpp does not know"
        ));
    };
    let row = shape.first().copied().unwrap_or(1);
    if !row.is_multiple_of(block) {
        return Err(format!(
            "the row length of tensor `{name}` must be a multiple of {block} (got {row})"
        ));
    }
    let elements = shape
        .iter()
        .try_fold(1_u64, |product, it| product.checked_mul(*it));
    // llama.cpp counts the elements of a tensor in an `i64`.
    let elements = elements.filter(|it| i64::try_from(*it).is_ok());
    let size = elements.and_then(|it| (it / block).checked_mul(bytes));
    size.ok_or_else(|| format!("tensor `{name}` is too large: its shape is {shape:?}"))
}

/// Returns the number of values in a block of this data type, and the block's size in bytes (from `ggml.h` and
/// `ggml-common.h`).
fn block_size(data_type: u32) -> Option<(u64, u64)> {
    Some(match data_type {
        // F32, I32
        0 | 26 => (1, 4),
        // F16, I16, BF16
        1 | 25 | 30 => (1, 2),
        // I8
        24 => (1, 1),
        // I64, F64
        27 | 28 => (1, 8),
        // Q4_0 and IQ4_NL, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1, MXFP4
        2 | 20 => (32, 18),
        3 => (32, 20),
        6 => (32, 22),
        7 => (32, 24),
        8 => (32, 34),
        9 => (32, 36),
        39 => (32, 17),
        // Q2_K to Q8_K
        10 => (256, 84),
        11 | 21 => (256, 110),
        12 => (256, 144),
        13 => (256, 176),
        14 => (256, 210),
        15 => (256, 292),
        // IQ2_XXS and TQ2_0, IQ2_XS, IQ3_XXS, IQ1_S, IQ2_S, IQ4_XS, IQ1_M, TQ1_0
        16 | 35 => (256, 66),
        17 => (256, 74),
        18 => (256, 98),
        19 => (256, 50),
        22 => (256, 82),
        23 => (256, 136),
        29 => (256, 56),
        34 => (256, 54),
        // NVFP4, Q1_0, Q2_0
        40 => (64, 36),
        41 => (128, 18),
        42 => (64, 18),
        _ => return None,
    })
}
