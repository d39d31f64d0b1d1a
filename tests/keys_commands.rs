//! `tokenway keys`: the commands that manage a keys file.

mod support;

use std::os::unix::fs::PermissionsExt;

use support::keys::KeysFile;

#[tokio::test]
async fn changes_keep_comments_and_other_keys_and_the_file_is_private() {
    let keys = KeysFile::new();
    keys.secret("new a").await;
    let mode = std::fs::metadata(&keys.path).expect("a file").permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
    let commented = format!("# The keys of our team.\n{}# The end.\n", keys.text());
    std::fs::write(&keys.path, commented).expect("a file");
    keys.secret("new b --model x --expires-in 90d").await;
    keys.secret("rotate a").await;
    keys.secret("new c").await;
    keys.run("revoke b").await.expect_success();
    keys.run("revoke c").await.expect_success();
    let text = keys.text();
    for comment in ["# The keys of our team.\n", "# The end.\n"] {
        assert!(text.contains(comment), "{text}");
    }
    let list = keys.run("list").await.expect_success();
    let lines: Vec<_> = list.lines().collect();
    assert!(
        lines[0].starts_with("NAME  SCOPES     MODELS  LIMITS  EXPIRES"),
        "{list}"
    );
    assert!(
        lines[1].starts_with("a     inference  all     none    20"),
        "{list}"
    );
    assert!(lines[1].ends_with(", never"), "{list}");
    assert_eq!(lines.len(), 2, "{list}");
}

#[tokio::test]
async fn the_list_shows_the_limits_of_each_key() {
    let keys = KeysFile::new();
    keys.secret("new a").await;
    keys.secret("new b --concurrent-requests 4").await;
    let all = "--requests-per-minute 60 --concurrent-requests 4 --tokens-per-minute 1000";
    keys.secret(&format!("new c {all}")).await;
    let budgets = "--weight 4 --budget 500/day --completion-budget 9";
    keys.secret(&format!("new d {budgets}")).await;
    let list = keys.run("list").await.expect_success();
    let lines: Vec<_> = list.lines().map(str::split_whitespace).collect();
    let lines: Vec<_> = lines
        .into_iter()
        .map(|line| line.collect::<Vec<_>>().join(" "))
        .collect();
    let expected = [
        "NAME SCOPES MODELS LIMITS EXPIRES",
        "a inference all none never",
        "b inference all 4 concurrent never",
        "c inference all 60 requests/min, 4 concurrent, 1000 tokens/min never",
        "d inference all weight 4, 500 tokens per day, 9 completion tokens in total never",
    ];
    assert_eq!(lines, expected);
}

#[tokio::test]
async fn a_keys_weight_is_in_the_file_unless_it_is_the_default() {
    let keys = KeysFile::new();
    keys.secret("new a --weight 1").await;
    assert!(!keys.text().contains("weight"), "{}", keys.text());
    keys.secret("new b --weight 4 --scope inference,priority")
        .await;
    let expected = "name = \"b\"\nscopes = [\"inference\", \"priority\"]\nweight = 4\n";
    assert!(keys.text().contains(expected), "{}", keys.text());
}

#[tokio::test]
async fn an_invalid_command_changes_nothing() {
    let keys = KeysFile::new();
    keys.secret("new a").await;
    let before = keys.text();
    for (arguments, expected) in [
        ("new a", "a key with the name a already exists"),
        ("revoke b", "there is no key with the name b"),
        ("rotate b", "there is no key with the name b"),
        ("new b --expires-in=-1d", "--expires-in must be a time"),
    ] {
        let error = keys.run(arguments).await.expect_failure();
        assert!(error.contains(expected), "{error}");
    }
    for (arguments, expected) in [
        ("new a/b", "must be 1 to 64 of the characters"),
        (
            "new b --scope root",
            "must be inference, metrics, admin or priority",
        ),
        ("new b --expires-in soon", "soon"),
        ("new b --weight 101", "must be a whole number from 1 to 100"),
    ] {
        let outcome = keys.run(arguments).await;
        assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
        assert!(outcome.stderr.contains(expected), "{}", outcome.stderr);
    }
    assert_eq!(keys.text(), before);
    std::fs::write(&keys.path, "[[key]]\nname = \"tw_secret 1\"").expect("a file");
    let error = keys.run("new b").await.expect_failure();
    let expected = format!("keys file {}:2: must be 1 to 64", keys.path.display());
    assert!(
        error.contains(&expected) && !error.contains("secret"),
        "{error}"
    );
    assert!(keys.folder.path().exists());
}
