use super::*;
use gguf::{Gguf, Value as Written};

#[path = "../../../../tests/support/gguf.rs"]
#[expect(
    dead_code,
    unreachable_pub,
    reason = "the integration tests use the other items"
)]
mod gguf;

fn check(bytes: &[u8]) -> Result<(), String> {
    let length = u64::try_from(bytes.len()).unwrap();
    check_model(&Header::parse(bytes, length)?)
}

#[track_caller]
fn assert_rejected(model: &Gguf, reason: &str) {
    assert_eq!(check(&model.bytes()), Err(reason.to_owned()));
}

#[track_caller]
fn assert_number_rejected(key: &str, value: u32, rule: &str) {
    let model = Gguf::tiny().with(key, Written::U32(value));
    assert_rejected(&model, &format!("`{key}` {rule} (got {value})"));
}

#[test]
fn a_valid_model_passes() {
    assert_eq!(check(&Gguf::tiny().bytes()), Ok(()));
}

#[test]
fn numbers_outside_llama_cpp_limits_are_rejected_with_the_limits() {
    let max = "2147483647";
    assert_number_rejected("llama.block_count", 0, "must be from 1 to 512");
    assert_number_rejected("llama.block_count", 513, "must be from 1 to 512");
    assert_number_rejected(
        "llama.context_length",
        0,
        &format!("must be from 1 to {max}"),
    );
    assert_number_rejected(
        "llama.embedding_length",
        0,
        &format!("must be from 1 to {max}"),
    );
    assert_number_rejected(
        "llama.attention.head_count",
        0,
        &format!("must be from 1 to {max}"),
    );
    assert_number_rejected(
        "llama.attention.head_count_kv",
        0,
        &format!("must be from 1 to {max}"),
    );
    let rule = "must divide the number of heads, 2";
    assert_number_rejected("llama.attention.head_count_kv", 3, rule);
    assert_number_rejected("llama.rope.dimension_count", 3, "must be even");
    assert_number_rejected("llama.expert_count", 1025, "must be from 0 to 1024");
    assert_number_rejected("llama.expert_used_count", 1, "must be from 0 to 0");
    assert_number_rejected("llama.nextn_predict_layers", 1, "must be from 0 to 0");
    let rule = "must be a token id from 0 to 257";
    assert_number_rejected("tokenizer.ggml.eos_token_id", 258, rule);
    assert_number_rejected("tokenizer.ggml.fim_pre_token_id", 258, rule);
}

#[test]
fn a_special_token_id_may_be_absent() {
    let none = Written::U32(u32::MAX);
    let model = Gguf::tiny().with("tokenizer.ggml.padding_token_id", none);
    assert_eq!(check(&model.bytes()), Ok(()));
}

#[test]
fn expert_counts_must_be_consistent() {
    let experts = |count: u32, used: u32, groups: u32, groups_used: u32| {
        Gguf::tiny()
            .with("llama.expert_count", Written::U32(count))
            .with("llama.expert_used_count", Written::U32(used))
            .with("llama.expert_group_count", Written::U32(groups))
            .with("llama.expert_group_used_count", Written::U32(groups_used))
    };
    assert_eq!(check(&experts(8, 2, 4, 2).bytes()), Ok(()));
    let reason = "`llama.expert_used_count` must be from 1 to 8 (got 0)";
    assert_rejected(&experts(8, 0, 1, 1), reason);
    let reason = "`llama.expert_group_count` must be from 0 to 7 (got 8)";
    assert_rejected(&experts(8, 2, 8, 1), reason);
    let reason = "`llama.expert_group_count` must divide the number of experts, 8 (got 3)";
    assert_rejected(&experts(8, 2, 3, 1), reason);
    let reason = "`llama.expert_group_used_count` must be from 1 to 3 (got 4)";
    assert_rejected(&experts(8, 2, 4, 4), reason);
}

#[test]
fn lists_must_have_one_value_per_layer_or_token() {
    let heads = Gguf::tiny().with("llama.attention.head_count", Written::U32s(vec![2, 2]));
    let reason = "`llama.attention.head_count` must have 1 integers, one per layer (got 2)";
    assert_rejected(&heads, reason);
    let scores = Gguf::tiny().with("tokenizer.ggml.scores", Written::F32s(vec![0.0; 257]));
    let reason = "`tokenizer.ggml.scores` must have 258 values, one per token (got 257)";
    assert_rejected(&scores, reason);
    let twice = vec!["a".to_owned(), "b".to_owned(), "a".to_owned()];
    let twice = Gguf::tiny().with("tokenizer.ggml.tokens", Written::Texts(twice));
    let reason = "`tokenizer.ggml.tokens` has the token \"a\" twice, the second time at index 2";
    assert_rejected(&twice, reason);
    let none = Gguf::tiny().with("tokenizer.ggml.tokens", Written::Texts(Vec::new()));
    let reason = "`tokenizer.ggml.tokens` must have from 1 to 2147483647 tokens (got 0)";
    assert_rejected(&none, reason);
    let few = vec!["a".to_owned(), "b".to_owned()];
    let few = Gguf::tiny()
        .with("tokenizer.ggml.tokens", Written::Texts(few))
        .without("tokenizer.ggml.scores")
        .without("tokenizer.ggml.token_type");
    let reason = "tensor `token_embd.weight` must have 2 rows, one per token (got 258)";
    assert_rejected(&few, reason);
}

#[test]
fn missing_and_mistyped_keys_are_named() {
    let reason = "`llama.block_count` is missing; it must be an integer from 1 to 512";
    assert_rejected(&Gguf::tiny().without("llama.block_count"), reason);
    let text = Gguf::tiny().with("llama.block_count", Written::Text("30".to_owned()));
    assert_rejected(&text, "`llama.block_count` must be an integer");
    let reason = "`general.architecture` is missing; it must name the model's architecture";
    assert_rejected(&Gguf::tiny().without("general.architecture"), reason);
    let rope = Gguf::tiny().with("llama.rope.scaling.type", Written::Text("more".to_owned()));
    let reason =
        "`llama.rope.scaling.type` must be one of none, linear, yarn, longrope (got \"more\")";
    assert_rejected(&rope, reason);
}

#[test]
fn tensors_must_be_valid_and_contiguous() {
    let change = |change: fn(&mut gguf::Tensor)| {
        let mut model = Gguf::tiny();
        change(&mut model.tensors[1]);
        model
    };
    let mut matrix = Gguf::tiny();
    matrix.tensors[0].kind = 4;
    let reason = "tensor `token_embd.weight` has data type 4, which llama.cpp does not know";
    assert_rejected(&matrix, reason);
    matrix.tensors[0].kind = 26;
    let reason = "tensor `token_embd.weight` has data type 26, which weights cannot have";
    assert_rejected(&matrix, reason);
    let zero = change(|it| it.dimensions = vec![0]);
    let reason = "every dimension of tensor `output_norm.weight` must be at least 1 (got [0])";
    assert_rejected(&zero, reason);
    let large = change(|it| it.dimensions = vec![1 << 40, 1 << 40]);
    let reason =
        "tensor `output_norm.weight` is too large: its shape is [1099511627776, 1099511627776]";
    assert_rejected(&large, reason);
    let data_type = change(|it| it.kind = 4);
    let reason = "tensor `output_norm.weight` must have data type 0, 32-bit floats (got 4)";
    assert_rejected(&data_type, reason);
    let frequencies = change(|it| {
        it.name = "rope_freqs.weight".to_owned();
        it.kind = 1;
    });
    let reason = "tensor `rope_freqs.weight` must have data type 0, 32-bit floats (got 1)";
    assert_rejected(&frequencies, reason);
    matrix.tensors[0].kind = 2;
    matrix.tensors[0].dimensions[0] = 33;
    let reason = "the row length of tensor `token_embd.weight` must be a multiple of 32 (got 33)";
    assert_rejected(&matrix, reason);
    let five = change(|it| it.dimensions = vec![1; 5]);
    let reason = "tensor `output_norm.weight` must have at most 4 dimensions (got 5)";
    assert_rejected(&five, reason);
    let twice = change(|it| it.name = "token_embd.weight".to_owned());
    assert_rejected(&twice, "tensor `token_embd.weight` is in the file twice");
    let moved = change(|it| it.bytes.extend([0; 32]));
    let reason = "tensor `blk.0.attn_norm.weight` must start at 33152, after the previous tensor (got 33184)";
    assert_rejected(&moved, reason);
    let mut none = Gguf::tiny();
    none.tensors.clear();
    assert_rejected(&none, "the file has no tensors");
    let aligned = Gguf::tiny().with("general.alignment", Written::U32(24));
    let reason = "`general.alignment` must be a power of two from 32 to 1048576 (got 24)";
    assert_rejected(&aligned, reason);
}

#[test]
fn truncated_and_corrupt_headers_are_rejected_without_large_allocations() {
    let bytes = Gguf::tiny().bytes();
    for length in (0..bytes.len()).step_by(101) {
        assert!(check(&bytes[..length]).is_err(), "{length}");
    }
    // Write a huge number at many offsets of the header. An allocation of that size would make the test fail.
    let header = bytes.len()
        - Gguf::tiny()
            .tensors
            .iter()
            .map(|it| it.bytes.len())
            .sum::<usize>();
    for at in (4..header.min(6000) - 8).step_by(3) {
        let mut broken = bytes.clone();
        broken[at..at + 8].copy_from_slice(&(u64::MAX / 3).to_le_bytes());
        let _ = check(&broken);
    }
}

#[test]
fn unsupported_gguf_versions_are_rejected() {
    for version in [0, 1, 4] {
        let model = Gguf {
            version,
            ..Gguf::tiny()
        };
        assert_rejected(
            &model,
            &format!("the GGUF version must be 2 or 3 (got {version})"),
        );
    }
    assert_eq!(
        check(b"GGML...."),
        Err("this is not a GGUF model file".to_owned())
    );
}

#[test]
fn negative_and_non_finite_epsilons_are_rejected() {
    let key = "llama.attention.layer_norm_rms_epsilon";
    for epsilon in [-1.0, f32::NAN, f32::INFINITY] {
        let model = Gguf::tiny().with(key, Written::F32(epsilon));
        assert_rejected(
            &model,
            &format!("`{key}` must be 0 or more (got {epsilon})"),
        );
    }
}

#[test]
fn rope_frequencies_must_be_positive() {
    for (name, number, least) in [
        ("freq_base", 0.0, "above 0"),
        ("freq_base", f32::NAN, "above 0"),
        ("freq_base_swa", -1.0, "above 0"),
        ("scaling.factor", f32::NAN, "0 or more"),
    ] {
        let key = format!("llama.rope.{name}");
        let model = Gguf::tiny().with(&key, Written::F32(number));
        assert_rejected(&model, &format!("`{key}` must be {least} (got {number})"));
    }
}

#[test]
fn a_sentencepiece_vocabulary_must_have_every_byte_token() {
    let model = Written::Text("llama".to_owned());
    let model = Gguf::tiny().with("tokenizer.ggml.model", model);
    let reason =
        "`tokenizer.ggml.tokens` lacks the token `<0x00>`; it must have one token per byte";
    assert_rejected(&model, reason);
}
