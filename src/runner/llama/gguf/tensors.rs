//! Whether the tensors that a GGUF header names can be in the file.

use std::collections::HashSet;

use super::{Header, Tensor};

/// The most dimensions of a tensor (`GGML_MAX_DIMS`).
pub(super) const MAX_DIMENSIONS: u32 = 4;

/// The longest name of a tensor, in bytes (`GGML_MAX_NAME`, less its ending zero).
const MAX_NAME: usize = 63;

/// The alignment of tensors where the file does not say.
const DEFAULT_ALIGNMENT: u64 = 32;

/// ggml's `TENSOR_ALIGNMENT`: it aborts where a tensor in mapped memory is aligned to less.
const MIN_ALIGNMENT: i128 = 32;

/// The largest alignment that is read: a page of memory, many times over.
const MAX_ALIGNMENT: i128 = 1 << 20;

/// The types that weights cannot have: ggml does not multiply by whole numbers and 64-bit floats, and Q8_1 and Q8_K
/// are for activations.
const NOT_WEIGHTS: [u32; 7] = [9, 15, 24, 25, 26, 27, 28];

/// Lists of token ids, in models that choose experts by them.
const TOKEN_LISTS: &str = "tid2eid";

/// Checks every tensor's name, shape, type and place. `end` is where the header ends in a file of this length.
pub(super) fn check(header: &Header, end: u64, length: u64) -> Result<(), String> {
    let alignment = alignment(header)?;
    if header.tensors.is_empty() {
        return Err("it has no tensors".to_owned());
    }
    let data = end.next_multiple_of(alignment);
    let mut names = HashSet::new();
    let mut offset = 0_u64;
    for tensor in &header.tensors {
        let name = &tensor.name;
        if name.len() > MAX_NAME {
            return Err(format!(
                "the name of tensor `{name}` is longer than {MAX_NAME} bytes"
            ));
        }
        if !names.insert(name) {
            return Err(format!("tensor `{name}` appears twice"));
        }
        check_type(tensor)?;
        let size = size(tensor)?;
        if tensor.offset != offset {
            let at = tensor.offset;
            return Err(format!(
                "tensor `{name}` is at {at}; it must follow the one before, at {offset}"
            ));
        }
        let end = data.checked_add(offset).and_then(|at| at.checked_add(size));
        if end.is_none_or(|end| end > length) {
            return Err(format!(
                "the file is truncated: it ends at {length} bytes, before the end of tensor `{name}`"
            ));
        }
        offset = (offset + size).next_multiple_of(alignment);
    }
    Ok(())
}

/// Whether ggml can compute with a tensor of this type.
fn check_type(tensor: &Tensor) -> Result<(), String> {
    let name = &tensor.name;
    let is_weight = name.ends_with(".weight") || name.ends_with(".bias");
    if is_weight && NOT_WEIGHTS.contains(&tensor.kind) && !name.contains(TOKEN_LISTS) {
        let kind = tensor.kind;
        return Err(format!(
            "tensor `{name}` is of type {kind}, which weights cannot have"
        ));
    }
    // Norms, biases, frequencies: converters write all of them so, and ggml's operations take nothing else.
    let is_vector = tensor.dimensions.len() <= 1;
    if is_vector && !name.contains(TOKEN_LISTS) && tensor.kind != 0 {
        let kind = tensor.kind;
        return Err(format!(
            "tensor `{name}` is of type {kind}; it must be of type 0, 32-bit floats"
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
            "`{KEY}` is {alignment}; it must be a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}"
        )
    })
}

/// The bytes of a tensor's data.
fn size(tensor: &Tensor) -> Result<u64, String> {
    let (name, kind, shape) = (&tensor.name, tensor.kind, &tensor.dimensions);
    if shape.contains(&0) {
        return Err(format!(
            "tensor `{name}` has the shape {shape:?}; no dimension may be 0"
        ));
    }
    let Some((block, bytes)) = block(kind) else {
        return Err(format!(
            "tensor `{name}` is of type {kind}, which llama.cpp does not have"
        ));
    };
    let row = shape.first().copied().unwrap_or(1);
    if !row.is_multiple_of(block) {
        return Err(format!(
            "tensor `{name}` has rows of {row} values; its type needs a multiple of {block}"
        ));
    }
    let elements = shape
        .iter()
        .try_fold(1_u64, |product, it| product.checked_mul(*it));
    // llama.cpp counts elements in an i64.
    let elements = elements.filter(|it| i64::try_from(*it).is_ok());
    let size = elements.and_then(|it| (it / block).checked_mul(bytes));
    size.ok_or_else(|| format!("tensor `{name}` has the shape {shape:?}, which is too large"))
}

/// How many values a block of a type holds, and in how many bytes (`ggml.h` and `ggml-common.h`).
fn block(kind: u32) -> Option<(u64, u64)> {
    Some(match kind {
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
