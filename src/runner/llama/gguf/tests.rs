use super::*;
use gguf::{Gguf, Value as Written};

#[path = "../../../../tests/support/gguf.rs"]
#[expect(
    dead_code,
    unreachable_pub,
    reason = "the integration tests use the rest of it"
)]
mod gguf;

fn check(bytes: &[u8]) -> Result<(), String> {
    let length = u64::try_from(bytes.len()).unwrap();
    check_model(&Header::parse(bytes, length)?)
}

#[track_caller]
fn refused(model: &Gguf, reason: &str) {
    assert_eq!(check(&model.bytes()), Err(reason.to_owned()));
}

#[track_caller]
fn number_is_refused(key: &str, value: u32, reason: &str) {
    let model = Gguf::tiny().with(key, Written::U32(value));
    refused(&model, &format!("`{key}` is {value}; {reason}"));
}

#[test]
fn a_valid_model_passes() {
    assert_eq!(check(&Gguf::tiny().bytes()), Ok(()));
}

#[test]
fn numbers_outside_llama_cpp_limits_are_rejected_with_the_limits() {
    let most = "2147483647";
    number_is_refused("llama.block_count", 0, "it must be from 1 to 512");
    number_is_refused("llama.block_count", 513, "it must be from 1 to 512");
    number_is_refused(
        "llama.context_length",
        0,
        &format!("it must be from 1 to {most}"),
    );
    number_is_refused(
        "llama.embedding_length",
        0,
        &format!("it must be from 1 to {most}"),
    );
    number_is_refused(
        "llama.attention.head_count",
        0,
        &format!("it must be from 1 to {most}"),
    );
    number_is_refused(
        "llama.attention.head_count_kv",
        0,
        &format!("it must be from 1 to {most}"),
    );
    let reason = "it must divide the number of heads, 2";
    number_is_refused("llama.attention.head_count_kv", 3, reason);
    number_is_refused("llama.rope.dimension_count", 3, "it must be even");
    number_is_refused("llama.expert_count", 1025, "it must be from 0 to 1024");
    number_is_refused("llama.expert_used_count", 1, "it must be from 0 to 0");
    number_is_refused("llama.nextn_predict_layers", 1, "it must be from 0 to 0");
    let reason = "the vocabulary has the tokens 0 to 257";
    number_is_refused("tokenizer.ggml.eos_token_id", 258, reason);
    number_is_refused("tokenizer.ggml.fim_pre_token_id", 258, reason);
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
    let reason = "`llama.expert_used_count` is 0; it must be from 1 to 8";
    refused(&experts(8, 0, 1, 1), reason);
    let reason = "`llama.expert_group_count` is 8; it must be from 0 to 7";
    refused(&experts(8, 2, 8, 1), reason);
    let reason = "`llama.expert_group_count` is 3; it must divide the number of experts, 8";
    refused(&experts(8, 2, 3, 1), reason);
    let reason = "`llama.expert_group_used_count` is 4; it must be from 1 to 3";
    refused(&experts(8, 2, 4, 4), reason);
}

#[test]
fn lists_must_have_one_value_per_layer_or_token() {
    let heads = Gguf::tiny().with("llama.attention.head_count", Written::U32s(vec![2, 2]));
    let reason = "`llama.attention.head_count` has 2 numbers; it must have 1, one for each layer";
    refused(&heads, reason);
    let scores = Gguf::tiny().with("tokenizer.ggml.scores", Written::F32s(vec![0.0; 257]));
    let reason = "`tokenizer.ggml.scores` has 257 values; it must have 258, one for each token";
    refused(&scores, reason);
    let twice = vec!["a".to_owned(), "b".to_owned(), "a".to_owned()];
    let twice = Gguf::tiny().with("tokenizer.ggml.tokens", Written::Texts(twice));
    let reason = "`tokenizer.ggml.tokens` has the token \"a\" twice, the second time as 2";
    refused(&twice, reason);
    let none = Gguf::tiny().with("tokenizer.ggml.tokens", Written::Texts(Vec::new()));
    let reason = "`tokenizer.ggml.tokens` has 0 tokens; it must have from 1 to 2147483647";
    refused(&none, reason);
    let few = vec!["a".to_owned(), "b".to_owned()];
    let few = Gguf::tiny()
        .with("tokenizer.ggml.tokens", Written::Texts(few))
        .without("tokenizer.ggml.scores")
        .without("tokenizer.ggml.token_type");
    let reason = "`tokenizer.ggml.tokens` has 2 tokens; tensor `token_embd.weight` has 258 rows";
    refused(&few, reason);
}

#[test]
fn missing_and_mistyped_keys_are_named() {
    let reason = "`llama.block_count` is missing; it must be a number from 1 to 512";
    refused(&Gguf::tiny().without("llama.block_count"), reason);
    let text = Gguf::tiny().with("llama.block_count", Written::Text("30".to_owned()));
    refused(&text, "`llama.block_count` must be a whole number");
    let reason = "`general.architecture` is missing; it must name the kind of model";
    refused(&Gguf::tiny().without("general.architecture"), reason);
    let rope = Gguf::tiny().with("llama.rope.scaling.type", Written::Text("more".to_owned()));
    let reason =
        "`llama.rope.scaling.type` is \"more\"; it must be one of none, linear, yarn, longrope";
    refused(&rope, reason);
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
    let reason = "tensor `token_embd.weight` is of type 4, which llama.cpp does not have";
    refused(&matrix, reason);
    matrix.tensors[0].kind = 26;
    let reason = "tensor `token_embd.weight` is of type 26, which weights cannot have";
    refused(&matrix, reason);
    let zero = change(|it| it.dimensions = vec![0]);
    let reason = "tensor `output_norm.weight` has the shape [0]; no dimension may be 0";
    refused(&zero, reason);
    let large = change(|it| it.dimensions = vec![1 << 40, 1 << 40]);
    let reason = "tensor `output_norm.weight` has the shape [1099511627776, 1099511627776], which is too large";
    refused(&large, reason);
    let kind = change(|it| it.kind = 4);
    let reason = "tensor `output_norm.weight` is of type 4; it must be of type 0, 32-bit floats";
    refused(&kind, reason);
    let frequencies = change(|it| {
        it.name = "rope_freqs.weight".to_owned();
        it.kind = 1;
    });
    let reason = "tensor `rope_freqs.weight` is of type 1; it must be of type 0, 32-bit floats";
    refused(&frequencies, reason);
    matrix.tensors[0].kind = 2;
    matrix.tensors[0].dimensions[0] = 33;
    let reason =
        "tensor `token_embd.weight` has rows of 33 values; its type needs a multiple of 32";
    refused(&matrix, reason);
    let five = change(|it| it.dimensions = vec![1; 5]);
    let reason = "tensor `output_norm.weight` has 5 dimensions; at most 4 are allowed";
    refused(&five, reason);
    let twice = change(|it| it.name = "token_embd.weight".to_owned());
    refused(&twice, "tensor `token_embd.weight` appears twice");
    let moved = change(|it| it.bytes.extend([0; 32]));
    let reason =
        "tensor `blk.0.attn_norm.weight` is at 33184; it must follow the one before, at 33152";
    refused(&moved, reason);
    let mut none = Gguf::tiny();
    none.tensors.clear();
    refused(&none, "it has no tensors");
    let aligned = Gguf::tiny().with("general.alignment", Written::U32(24));
    let reason = "`general.alignment` is 24; it must be a power of two from 32 to 1048576";
    refused(&aligned, reason);
}

#[test]
fn truncated_and_corrupt_headers_are_rejected_without_large_allocations() {
    let bytes = Gguf::tiny().bytes();
    for length in (0..bytes.len()).step_by(101) {
        assert!(check(&bytes[..length]).is_err(), "{length}");
    }
    // Each number of the header as a huge one: were it allocated by, the test would not end.
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
        refused(
            &model,
            &format!("its GGUF version is {version}; it must be 2 or 3"),
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
        refused(
            &model,
            &format!("`{key}` is {epsilon}; it must be 0 or more"),
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
        refused(&model, &format!("`{key}` is {number}; it must be {least}"));
    }
}

#[test]
fn a_sentencepiece_vocabulary_must_have_every_byte_token() {
    let model = Written::Text("llama".to_owned());
    let model = Gguf::tiny().with("tokenizer.ggml.model", model);
    let reason = "`tokenizer.ggml.tokens` lacks the token `<0x00>`; it must have one for each byte";
    refused(&model, reason);
}
