use std::collections::BTreeMap;
use std::env::VarError;

use super::*;
use crate::config::hub_variables::hub_options;
use crate::hub::HubOptions;

/// Returns the Hub's options for an environment that has only these variables.
fn options(variables: &[(&str, &str)]) -> Result<HubOptions, ConfigError> {
    let variables: BTreeMap<_, _> = variables.iter().copied().collect();
    hub_options(|name| {
        let value = variables.get(name).map(|value| (*value).to_owned());
        value.ok_or(VarError::NotPresent)
    })
}

#[test]
fn the_cache_folder_is_found_as_other_programs_find_it() {
    let all = [
        ("HOME", "/home"),
        ("XDG_CACHE_HOME", "/xdg"),
        ("HF_HOME", "/hf"),
        ("HF_HUB_CACHE", "/cache"),
    ];
    let expected = [
        "/home/.cache/huggingface/hub",
        "/xdg/huggingface/hub",
        "/hf/hub",
        "/cache",
    ];
    for (count, expected) in (1..).zip(expected) {
        let cache = options(&all[..count]).unwrap().cache;
        assert_eq!(cache, Path::new(expected));
    }
    assert_eq!(
        options(&[("HOME", "/home"), ("HF_HOME", "")])
            .unwrap()
            .cache,
        Path::new(expected[0])
    );
    let error = options(&[]).err().unwrap().to_string();
    assert!(
        error.contains("HF_HUB_CACHE or HOME must be set"),
        "{error}"
    );
}

#[test]
fn a_tilde_at_the_start_of_a_path_is_the_home_folder_and_variables_in_it_are_not_expanded() {
    let home = ("HOME", "/home/u");
    for (variable, expected) in [
        (("HF_HUB_CACHE", "~/models"), "/home/u/models"),
        (("HF_HUB_CACHE", "~"), "/home/u"),
        (("HF_HOME", "~//hf"), "/home/u/hf/hub"),
        (("XDG_CACHE_HOME", "~/c"), "/home/u/c/huggingface/hub"),
        (("HF_HUB_CACHE", "/a/~/$HOME"), "/a/~/$HOME"),
    ] {
        let cache = options(&[home, variable]).unwrap().cache;
        assert_eq!(cache, Path::new(expected));
    }
    let literal = options(&[home, ("HF_HUB_CACHE", "~other/x")]).unwrap();
    assert!(literal.cache.ends_with("~other/x"), "{literal:?}");
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("t"), "hf_home").unwrap();
    let home = folder.path().display().to_string();
    let token = options(&[("HOME", &home), ("HF_TOKEN_PATH", "~/t")]).unwrap();
    assert!(token.token.is_some());
    let error = options(&[("HF_HUB_CACHE", "~/models")]).err().unwrap();
    let expected = "HF_HUB_CACHE starts with ~, but HOME is not set; write the whole path";
    assert!(error.to_string().contains(expected), "{error}");
}

#[test]
fn the_endpoint_and_the_policy_come_from_the_environment() {
    let home = ("HOME", "/nowhere");
    let default = options(&[home]).unwrap();
    assert_eq!(default.endpoint.as_str(), "https://huggingface.co");
    assert!(!default.is_offline && default.token.is_none());
    let variables = [
        home,
        ("HF_ENDPOINT", "http://mirror:1/"),
        ("HF_HUB_OFFLINE", "true"),
    ];
    let set = options(&variables).unwrap();
    assert_eq!(set.endpoint.as_str(), "http://mirror:1");
    assert!(set.is_offline);
    assert!(
        !options(&[home, ("HF_HUB_OFFLINE", "0")])
            .unwrap()
            .is_offline
    );
}

#[test]
fn the_token_comes_from_a_variable_or_the_stored_file() {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().display().to_string();
    let other = folder.path().join("other").display().to_string();
    std::fs::write(folder.path().join("token"), "hf_home\n").unwrap();
    std::fs::write(&other, "hf_other").unwrap();
    let home = ("HF_HOME", &*home);
    for (variables, expected) in [
        (&[home][..], Some("Bearer hf_home")),
        (&[home, ("HF_TOKEN_PATH", &other)], Some("Bearer hf_other")),
        (
            &[home, ("HF_TOKEN", "hf_variable")],
            Some("Bearer hf_variable"),
        ),
        (&[home, ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")], None),
        (
            &[
                home,
                ("HF_TOKEN", "hf_variable"),
                ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"),
            ],
            None,
        ),
        (&[home, ("HF_HUB_OFFLINE", "1")], None),
        (&[("HF_HOME", "/nowhere")], None),
    ] {
        let token = options(variables).unwrap().token;
        let sent = token.map(|token| token.authorization());
        assert_eq!(
            sent.as_ref().and_then(|it| it.to_str().ok()),
            expected,
            "{variables:?}"
        );
    }
    // A folder cannot be read like a file.
    let unreadable = [home, ("HF_TOKEN_PATH", folder.path().to_str().unwrap())];
    let error = options(&unreadable).err().unwrap().to_string();
    assert!(error.contains("HF_HUB_DISABLE_IMPLICIT_TOKEN=1"), "{error}");
    let offline = [&unreadable[..], &[("HF_HUB_OFFLINE", "1")]].concat();
    assert!(options(&offline).is_ok());
    // An endless file is not read to its end.
    assert!(options(&[home, ("HF_TOKEN_PATH", "/dev/zero")]).is_err());
    std::fs::write(&other, "hf_secret\nx").unwrap();
    let error = options(&[home, ("HF_TOKEN_PATH", &other)])
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains(&other) && !error.contains("hf_secret"),
        "{error}"
    );
}

#[test]
fn the_key_model_is_a_text_or_tables() {
    let (_folder, path) = settings_file("model = 5");
    let error = error_of(&["--config", &path]);
    let expected =
        "model: write the only model as a string, or each model as a table under [[model]]";
    assert!(error.contains(expected), "{error}");
    for text in ["model = \"hf:a\"", "[[model]]\nmodel = \"hf:a\""] {
        let (_folder, path) = settings_file(text);
        let error = error_of(&["--config", &path]);
        assert!(error.contains("write hf:OWNER/REPO"), "{error}");
    }
    let error = error_of(&["--runner", "llm_test", "--model", "hf:a/b"]);
    assert!(
        error.contains("--model is for the runner llama only"),
        "{error}"
    );
}

#[cfg(feature = "llama-cpp")]
#[test]
fn a_downloaded_model_keeps_its_name_and_its_workers_get_the_path() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("m.gguf");
    std::fs::write(&file, "GGUF").unwrap();
    let line = ["--model", "hf:a/b:Q8_0", "--isolation", "process"];
    let Ok(ParsedCommand::Serve(server)) = read_line(&line) else {
        panic!("{line:?} is not accepted");
    };
    let downloads = server.parts.downloads.as_ref().unwrap();
    let [pending] = &downloads.models[..] else {
        panic!("one model is downloaded");
    };
    assert_eq!(pending.setting, "--model");
    let files = ModelFiles::from_iter([(pending.model.clone(), file.clone())]);
    let parts = server.parts.build(&files).unwrap();
    let model = &engine(&parts).models[0];
    assert_eq!(model.name, "a/b:Q8_0");
    let crate::server::Isolation::Process(program) = &model.isolation else {
        panic!("the workers are threads");
    };
    let path = format!("model_path = {:?}\n", file.display().to_string());
    assert!(program.settings.contains(&path), "{}", program.settings);
    assert!(!program.settings.contains("hf:"), "{}", program.settings);
}
