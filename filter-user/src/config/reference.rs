//! The configuration's reference, made from the types of the file: the JSON schema for editors, the page, the
//! commented file, and the man page `pullgate.toml(5)`.

use std::fmt::Write as _;

use serde_json::Value;

use super::raw::RawConfig;

#[path = "../../tests/pages/page.rs"]
mod page;

#[test]
fn the_reference_is_what_the_types_are() {
    let mut schema = schemars::schema_for!(RawConfig).to_value();
    schema["title"] = "pullgate.toml".into();
    let mut json = serde_json::to_string_pretty(&schema).unwrap();
    json.push('\n');
    page::compare("filter-user/dist/pullgate.schema.json", &json);

    let sections = sections(&schema);
    page::compare("docs/configuration.md", &markdown(&sections));
    page::compare("filter-user/dist/reference.toml", &toml(&sections));
    page::compare("filter-user/dist/pullgate.toml.5", &man(&sections));
}

/// A section of the file, or a table in it.
struct DocSection {
    /// As it is written in the file.
    head: &'static str,
    about: String,
    options: Vec<OptionDoc>,
}

struct OptionDoc {
    name: String,
    about: String,
    default: Option<Value>,
    example: Option<Value>,
    is_required: bool,
}

/// Each section: its head, the way to it in the schema, and the source that has its fields in order.
const SECTIONS: [(&str, &str, &str, &str); 10] = [
    ("[paths]", "paths", "RawPaths", include_str!("raw.rs")),
    (
        "[filter]",
        "filter",
        "RawFilter",
        include_str!("raw/filter.rs"),
    ),
    (
        "[ranges]",
        "ranges",
        "RawRanges",
        include_str!("raw/ranges.rs"),
    ),
    ("[gate]", "gate", "RawGate", include_str!("raw/gate.rs")),
    (
        "[gate.per_source]",
        "gate/per_source",
        "RawShare",
        include_str!("raw/gate.rs"),
    ),
    (
        "[gate.per_network]",
        "gate/per_network",
        "RawShare",
        include_str!("raw/gate.rs"),
    ),
    (
        "[[gate.host]]",
        "gate/host",
        "RawHost",
        include_str!("raw/host.rs"),
    ),
    (
        "upstream_tls = { … }",
        "gate/host/upstream_tls",
        "RawReencryption",
        include_str!("raw/host.rs"),
    ),
    ("[metrics]", "metrics", "RawMetrics", include_str!("raw.rs")),
    (
        "sources = [{ … }]",
        "RawTable",
        "RawTable",
        include_str!("raw/source.rs"),
    ),
];
/// Tables within an option, which are no sections of the commented file.
const INLINE: [&str; 2] = ["upstream_tls = { … }", "sources = [{ … }]"];
/// Options that most files have, though there are files without them.
const USUAL: [&str; 2] = ["trust", "upstream"];

fn sections(schema: &Value) -> Vec<DocSection> {
    let sections = SECTIONS.iter().map(|(head, path, structure, source)| {
        let (object, about) = match schema["$defs"].get(*path) {
            Some(table) => (table, ABOUT_SOURCES.to_owned()),
            None => at(schema, path),
        };
        let defaults = found(schema, path)["default"].clone();
        let required = object["required"].as_array().cloned().unwrap_or_default();
        let properties = object["properties"].as_object().unwrap();
        let mut options: Vec<_> = properties
            .iter()
            // Sections of their own.
            .filter(|(name, _)| {
                !SECTIONS
                    .iter()
                    .any(|(_, it, ..)| *it == format!("{path}/{name}") && *name != "upstream_tls")
            })
            .map(|(name, option)| OptionDoc {
                name: name.clone(),
                about: about_of(option),
                default: option
                    .get("default")
                    .filter(|it| !it.is_null())
                    .or_else(|| defaults.get(name))
                    .cloned()
                    .filter(|it| !it.is_null()),
                example: option["examples"].get(0).cloned(),
                is_required: required.iter().any(|it| it == name),
            })
            .collect();
        let fields = source
            .split(&format!("struct {structure} {{"))
            .nth(1)
            .unwrap();
        options.sort_by_key(|option| {
            let raw = if option.name == "static" {
                "static_"
            } else {
                &option.name
            };
            fields.find(&format!("\n    {raw}: ")).unwrap()
        });
        DocSection {
            head,
            about,
            options,
        }
    });
    sections.collect()
}

/// The property at a path.
fn found<'a>(schema: &'a Value, path: &str) -> &'a Value {
    path.split('/').fold(schema, |object, name| {
        let object = resolved(schema, object);
        object["properties"].get(name).unwrap_or(&Value::Null)
    })
}

/// The object at a path, and what the property is about.
fn at<'a>(schema: &'a Value, path: &str) -> (&'a Value, String) {
    let property = found(schema, path);
    (resolved(schema, property), about_of(property))
}

/// What a property refers to, is one of, or has as items.
fn resolved<'a>(schema: &'a Value, property: &'a Value) -> &'a Value {
    if let Some(reference) = property["$ref"].as_str() {
        return schema.pointer(reference.trim_start_matches('#')).unwrap();
    }
    if let Some(first) = property["anyOf"].get(0) {
        return resolved(schema, first);
    }
    match property.get("items") {
        Some(items) => resolved(schema, items),
        None => property,
    }
}

fn about_of(property: &Value) -> String {
    let text = property["description"].as_str().unwrap_or_default();
    text.replace('\n', " ")
}

/// A value as TOML writes it.
fn written(value: &Value) -> String {
    match value {
        Value::String(text) => format!("\"{text}\""),
        Value::Array(values) => {
            let values: Vec<_> = values.iter().map(written).collect();
            format!("[{}]", values.join(", "))
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => value.to_string(),
    }
}

fn markdown(sections: &[DocSection]) -> String {
    let mut text = String::from(PAGE);
    for section in sections {
        let DocSection {
            head,
            about,
            options,
        } = section;
        writeln!(
            text,
            "\n## `{head}`\n\n{about}\n\n| option | default | meaning |\n|---|---|---|"
        )
        .unwrap();
        for option in options {
            let default = match (&option.default, option.is_required) {
                (Some(default), _) => format!("`{}`", written(default)),
                (None, true) => "required".to_owned(),
                (None, false) => "none".to_owned(),
            };
            let meaning = option.about.replace('|', "\\|");
            writeln!(text, "| `{}` | {default} | {meaning} |", option.name).unwrap();
        }
    }
    text
}

fn toml(sections: &[DocSection]) -> String {
    let mut text = String::from(FILE);
    for section in sections
        .iter()
        .filter(|section| !INLINE.contains(&section.head))
    {
        comment(&mut text, &section.about);
        writeln!(text, "{}", section.head).unwrap();
        for option in &section.options {
            let name = &option.name;
            comment(&mut text, &option.about);
            let is_shown = option.is_required || USUAL.contains(&name.as_str());
            match (&option.default, &option.example) {
                (Some(default), _) => writeln!(text, "{name} = {}", written(default)),
                (None, Some(example)) if is_shown => {
                    writeln!(text, "{name} = {}", written(example))
                }
                (None, Some(example)) => writeln!(text, "# {name} = {}", written(example)),
                (None, None) => writeln!(text, "# {name} = …"),
            }
            .unwrap();
        }
        text.push('\n');
    }
    text
}

/// Lines of at most 100 columns, each behind `# `.
fn comment(text: &mut String, about: &str) {
    let mut line = String::from("#");
    for word in about.split(' ') {
        if line.chars().count() + 1 + word.chars().count() > 100 {
            writeln!(text, "{line}").unwrap();
            line = String::from("#");
        }
        write!(line, " {word}").unwrap();
    }
    writeln!(text, "{line}").unwrap();
}

fn man(sections: &[DocSection]) -> String {
    let mut text = String::from(MAN_HEAD);
    for section in sections {
        let DocSection {
            head,
            about,
            options,
        } = section;
        writeln!(text, ".SH \"{}\"\n{}", roff(head), roff(about)).unwrap();
        for option in options {
            writeln!(
                text,
                ".TP\n.B {}\n{}",
                roff(&option.name),
                roff(&option.about)
            )
            .unwrap();
            if let Some(default) = &option.default {
                writeln!(text, "Default: {}", roff(&written(default))).unwrap();
            }
        }
    }
    text.push_str(MAN_TAIL);
    text
}

/// Text without what roff(7) reads as its own: backslashes, hyphens, and lines that begin with a request.
fn roff(text: &str) -> String {
    let text = text
        .replace('\\', "\\e")
        .replace('-', "\\-")
        .replace('`', "")
        .replace('"', "\\(dq");
    if text.starts_with(['.', '\'']) {
        format!("\\&{text}")
    } else {
        text
    }
}

const ABOUT_SOURCES: &str = "A source of ranges with an address of its own, in `ranges.sources`.";
const PAGE: &str = "\
# Configuration

`/etc/pullgate/pullgate.toml`, or the file that `--config` names. `pullgate check` says whether it is OK; `systemctl reload
pullgate-filter` (or `-ranges`, `-gate`) applies a change. Unknown options are refused. Relative paths are relative to the
file, durations are written `\"100ms\"` to `\"365days\"`, ranges `192.0.2.0/24`, `2001:db8::/32` or a single address.

This page, `pullgate.toml(5)`, the commented file `/usr/share/doc/pullgate/reference.toml` and the schema for editors
(`/usr/share/pullgate/pullgate.schema.json`) are made from the same types as the parser.
";
const FILE: &str = "\
#:schema /usr/share/pullgate/pullgate.schema.json
# Every option of pullgate with its default, or an example where there is none. Relative paths are
# relative to the file. `pullgate check` says whether a file is OK.

";
const MAN_HEAD: &str = "\
.TH PULLGATE.TOML 5
.SH NAME
pullgate.toml \\- configuration of pullgate(8)
.SH SYNOPSIS
/etc/pullgate/pullgate.toml
.SH DESCRIPTION
A TOML file. Unknown options are refused. Relative paths are relative to the file.
.B pullgate check
says whether it is OK, and a reload of a role applies a change.
";
const MAN_TAIL: &str = "\
.SH FILES
.TP
/usr/share/doc/pullgate/reference.toml
every option with its default
.TP
/usr/share/pullgate/pullgate.schema.json
the JSON schema for editors
.SH EXAMPLE
.nf
[filter]
interfaces = \"auto\"

[[gate.host]]
names = [\"www.example.com\"]
certificate = \"/etc/pullgate/example.com.pem\"
key = \"/etc/pullgate/example.com.key\"
trust = [\"/etc/pullgate/our\\-ca.pem\"]
upstream = \"127.0.0.1:8080\"
.fi
.SH SEE ALSO
pullgate(8)
";
