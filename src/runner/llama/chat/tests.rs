use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value as Json, json};

use super::*;

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, "<s>".to_owned(), "</s>".to_owned()).unwrap()
}

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage {
        role: role.to_owned(),
        content: content.to_owned(),
        name: None,
    }
}

#[test]
fn chatml_ends_with_an_open_assistant_turn() {
    let chatml = template(
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + \
         message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
         {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    );
    assert_eq!(
        chatml.render(&[message("user", "<b>Hi</b> \"é\" {{ 1 }}")]),
        Ok("<|im_start|>user\n<b>Hi</b> \"é\" {{ 1 }}<|im_end|>\n<|im_start|>assistant\n".into())
    );
}

#[test]
fn templates_can_use_python_methods_and_namespaces() {
    let template = template(
        "{{ bos_token }}\n\
         {%- set ns = namespace(system='') %}\n\
         {%- if messages[0].role == 'system' %}\n\
             {%- set ns.system = messages[0]['content'].strip().upper() %}\n\
             {%- set messages = messages[1:] %}\n\
         {%- endif %}\n\
         {%- for message in messages %}\n\
             {%- if message.content.startswith('skip') %}{% continue %}{% endif %}\n\
             {%- if message.tool_calls is defined or tools %}{{ tools | tojson }}{% endif %}\n\
             {{- ns.system ~ '|' ~ message.content.split(' ')[-1] | trim ~ eos_token }}\n\
         {%- endfor %}\n",
    );
    let messages = [
        message("system", " be brief "),
        message("user", "skip me"),
        message("user", "one two"),
    ];
    assert_eq!(template.render(&messages), Ok("<s>BE BRIEF|two</s>".into()));
}

#[test]
fn templates_can_read_message_names() {
    let template = template(
        "{% for message in messages %}{{ message.name if message.name is defined else 'nobody' }}:\
         {{ message.content }};{% endfor %}",
    );
    let named = ChatMessage {
        name: Some("Ann".to_owned()),
        ..message("user", "Hi")
    };
    let rendered = template.render(&[named, message("user", "Ho")]);
    assert_eq!(rendered, Ok("Ann:Hi;nobody:Ho;".into()));
}

#[test]
fn block_tags_are_trimmed_with_their_line() {
    let template = template("{% if true %}\n  {% if true %}\nx\n  {% endif %}\n{% endif %}\n");
    assert_eq!(template.render(&[message("user", "")]), Ok("x\n".into()));
}

#[test]
fn raise_exception_rejects_the_messages() {
    let template = template("{{ raise_exception('Roles must alternate') }}");
    let rendered = template.render(&[message("user", "Hi")]);
    let reason = "The model's chat template rejected the messages: Roles must alternate";
    assert_eq!(rendered, Err(ModelError::Invalid(reason.to_owned())));
}

#[test]
fn an_invalid_template_does_not_compile() {
    let broken = ChatTemplate::new("{% for %}", String::new(), String::new());
    assert!(broken.is_err());
}

#[test]
fn a_render_error_names_the_line() {
    let template = template(
        "{# a #}\n{% generation %}\n{{ messages[0].content.nothing() }}\n{% endgeneration %}",
    );
    let Err(ModelError::Invalid(reason)) = template.render(&[message("user", "Hi")]) else {
        panic!("the template did not fail");
    };
    let start = "The model's chat template cannot render these messages: ";
    assert!(
        reason.starts_with(start) && reason.ends_with(" (line 3)"),
        "{reason}"
    );
}

#[test]
fn raise_exception_inside_a_macro_keeps_its_message() {
    let template = template(
        "{% macro check(m) %}{{ raise_exception('No ' ~ m.role) }}{% endmacro %}\
         {% for m in messages %}{{ check(m) }}{% endfor %}",
    );
    let reason = "The model's chat template rejected the messages: No user";
    let rendered = template.render(&[message("user", "Hi")]);
    assert_eq!(rendered, Err(ModelError::Invalid(reason.to_owned())));
}

#[test]
fn variables_set_in_a_generation_block_stay_local() {
    let template = template(
        "{% set x = 1 %}{% for m in messages %}{% generation %}{% set x = 2 %}{{ m.content ~ x }}\
         {% endgeneration %}{% endfor %}{{ x }}",
    );
    assert_eq!(template.render(&[message("user", "Hi")]), Ok("Hi21".into()));
}

#[test]
fn undefined_functions_can_be_tested_before_use() {
    let template = template(
        "{% if missing is defined and missing is callable %}{{ missing() }}{% endif %}\
         {{ strftime_now is callable }}{{ messages is callable }}\
         {{ tools is none }}{{ documents is none }}",
    );
    let rendered = template.render(&[message("user", "Hi")]);
    assert_eq!(rendered, Ok("TrueFalseTrueTrue".into()));
}

#[test]
fn an_endless_template_is_stopped() {
    for source in [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% for i in range(100000) %}{{ 'a' * 10000 }}{% endfor %}",
        "{% set n = namespace(s='ab') %}{% for i in range(64) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{{ 'a' * 100000000000 }}",
        "{{ range(100000000000) | list | length }}",
    ] {
        let stopped = template(source).render(&[message("user", "Hi")]);
        assert!(matches!(stopped, Err(ModelError::Invalid(_))), "{source}");
    }
    let macros = template("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}");
    assert!(macros.render(&[]).is_err());
}

#[test]
fn deeply_nested_lists_do_not_overflow_the_stack() {
    let nest = |count: u32, end: &str| {
        let (open, close) = ("[".repeat(30), "]".repeat(30));
        template(&format!(
            "{{% set n = namespace(l=[]) %}}{{% for i in range({count}) %}}\
             {{% set n.l = {open}n.l{close} %}}{{% endfor %}}{end}"
        ))
    };
    for count in [50, 5000, 20_000] {
        for end in [
            "",
            "{{ n.l }}",
            "{{ n.l == [n.l] }}",
            "{{ n.l | tojson }}",
            "{{ [n.l] | unique }}",
        ] {
            // The rendering may succeed or fail. A stack overflow would end the process.
            let _ = nest(count, end).render(&[message("user", "Hi")]);
        }
    }
}

#[test]
fn a_conversation_of_four_megabytes_renders() {
    let chatml = template(
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + \
         message['content'] | trim + '<|im_end|>' + '\n' }}{% endfor %}",
    );
    let messages = vec![message("user", &"word ".repeat(400)); 2000];
    let rendered = chatml.render(&messages).unwrap();
    assert!(rendered.len() > 4_000_000, "{}", rendered.len());
}

/// Renders the conversations with Python's Jinja and Hugging Face's settings. Returns, for each template, its name
/// and one result per conversation: `{"text": …}`, `{"refused": …}` with the text of `raise_exception`, or
/// `{"failed": …}`.
fn rendered_by_python(folder: &Path, conversations: &Json) -> Vec<(String, Vec<Json>)> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let interpreter = std::env::var_os("TOKENWAY_TEST_PYTHON");
    let interpreter = interpreter.map_or_else(|| root.join(".venv/bin/python"), PathBuf::from);
    let mut python = Command::new(interpreter)
        .arg(root.join("tests/clients/chat_templates.py"))
        .arg(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("Python starts (`scripts/venv.sh` makes .venv)");
    let request = json!({
        "bos_token": "<s>", "eos_token": "</s>", "now": NOW, "conversations": conversations,
    });
    let mut stdin = python.stdin.take().expect("stdin is a pipe");
    stdin
        .write_all(request.to_string().as_bytes())
        .expect("Python reads its standard input");
    drop(stdin);
    let output = python.wait_with_output().expect("Python exits");
    assert!(output.status.success(), "chat_templates.py failed");
    serde_json::from_slice(&output.stdout).expect("chat_templates.py prints JSON")
}

const NOW: &str = "2024-07-04T17:08:09";

/// A clock that always shows [`NOW`].
fn fixed_clock() -> Zoned {
    let now: jiff::civil::DateTime = NOW.parse().unwrap();
    now.to_zoned(jiff::tz::TimeZone::UTC).unwrap()
}

fn conversations() -> Json {
    let odd = " <b>&amp;</b> \"é\" 漢 'x' {{ 1 }} {% if %}\n\n";
    json!([
        [["user", "Hi there."]],
        [["system", "Be brief."], ["user", "Hi there."]],
        [["user", "One?"], ["assistant", "Yes."], ["user", "Two?"]],
        [
            ["system", odd],
            ["user", odd],
            ["assistant", odd],
            ["user", odd],
            ["assistant", "b"],
            ["user", "c"]
        ],
        [["user", "One?"], ["user", "Two?"]],
        [["assistant", "One."], ["user", "Two?"]],
        [
            ["user", "One?"],
            ["assistant", "<think>\nHm.\n</think>\n\nYes."],
            ["user", "Two?"]
        ],
        [["system", "Be brief."]],
        [["user", "One?"], ["system", "Be brief."], ["user", "Two?"]],
        [["user", "One?"], ["assistant", "Yes."]],
        [["unheard_of", "One?"]],
    ])
}

#[test]
fn real_templates_render_as_hugging_face_renders_them() {
    let folder = std::env::var_os("TOKENWAY_TEST_TEMPLATES").map_or_else(
        || {
            let home = std::env::var_os("HOME").expect("HOME is set");
            PathBuf::from(home).join(".cache/tokenway/chat-templates-11434.0.0")
        },
        PathBuf::from,
    );
    let at = folder.display();
    assert!(
        folder.is_dir(),
        "{at} does not exist: `scripts/chat_templates.sh` downloads the templates"
    );
    let conversations = conversations();
    let python = rendered_by_python(&folder, &conversations);
    assert!(python.len() > 70, "{} templates in {at}", python.len());
    let mut differences = Vec::new();
    for (name, expected) in python {
        let source = std::fs::read_to_string(folder.join(&name)).unwrap();
        let compiled = ChatTemplate::with_clock(&source, "<s>".into(), "</s>".into(), fixed_clock);
        let template = match compiled {
            Ok(template) => template,
            Err(error) => {
                differences.push(format!("{name} does not compile: {error}"));
                continue;
            }
        };
        for (conversation, expected) in conversations.as_array().unwrap().iter().zip(expected) {
            let messages: Vec<_> = conversation
                .as_array()
                .unwrap()
                .iter()
                .map(|it| message(it[0].as_str().unwrap(), it[1].as_str().unwrap()))
                .collect();
            let rendered = template.render(&messages);
            if !matches_python(&rendered, &expected) {
                differences.push(format!(
                    "{name} {conversation}\n  expected {expected}\n  got {rendered:?}"
                ));
            }
        }
    }
    assert!(
        differences.is_empty(),
        "{}\n{}",
        differences.len(),
        differences.join("\n")
    );
}

fn matches_python(rendered: &Result<String, ModelError>, expected: &Json) -> bool {
    match rendered {
        Ok(text) => expected["text"] == **text,
        Err(ModelError::Invalid(reason)) => match expected["refused"].as_str() {
            Some(text) => {
                *reason == format!("The model's chat template rejected the messages: {text}")
            }
            None => expected.get("failed").is_some(),
        },
        Err(ModelError::Failed(_) | ModelError::Unavailable(_)) => false,
    }
}

#[test]
fn format_widths_above_9999_are_rejected() {
    let render = |text: &str| template(text).render(&[message("user", "hi")]);
    assert_eq!(
        render("{{ '{:>4}|{:.2f}'.format('a', 0.5) }}"),
        Ok("   a|0.50".to_owned())
    );
    for text in [
        "{{ '{:>1000000000000}'.format('a') }}",
        "{{ '{:.100000f}'.format(0.5) }}",
    ] {
        let Err(ModelError::Invalid(error)) = render(text) else {
            panic!("{text} was not rejected");
        };
        assert!(error.contains("up to 9999"), "{error}");
    }
}
