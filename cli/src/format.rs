//! `--format`: a table, JSON, or a Go template as people write them for docker.
//!
//! ```text
//! table                        aligned columns
//! json                         one JSON object a line
//! {{.ID}} {{json .Labels}}     the template, once for each row
//! table {{.ID}}\t{{.Names}}    the template's columns, aligned, under a header
//! ```
//!
//! A template sees exactly the fields that `json` prints.

use std::{
    collections::HashMap,
    io::{ErrorKind, Write as _},
    str::FromStr,
};

use anyhow::Context as _;
use gtmpl::{Context, FuncError, Template, Value};
use serde::Serialize;

use crate::output;

/// How a list is printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PrintFormat {
    /// Aligned columns.
    Table,
    /// One JSON object a line.
    Json,
    /// A template for each row.
    Template(String),
    /// A template whose tabs are columns.
    TableTemplate(String),
}

impl FromStr for PrintFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // Shells keep these two as they are typed; docker replaces them as well.
        let template = |text: &str| text.replace("\\t", "\t").replace("\\n", "\n");
        match text {
            "table" => Ok(Self::Table),
            "json" => Ok(Self::Json),
            _ => match text.strip_prefix("table ") {
                Some(columns) => Ok(Self::TableTemplate(template(columns))),
                None if text.contains("{{") => Ok(Self::Template(template(text))),
                None => Err("expected table, json, or a Go template such as '{{.ID}}'".to_owned()),
            },
        }
    }
}

impl PrintFormat {
    /// Prints a list.
    ///
    /// # Errors
    /// The template doesn't fit, or stdout can't be written to.
    pub fn print<T: Serialize>(
        &self,
        header: &[&str],
        rows: &[T],
        cells: impl Fn(&T) -> Vec<String>,
    ) -> anyhow::Result<u8> {
        write_out(&self.render(header, rows, cells)?)
    }

    /// What [`PrintFormat::print`] prints.
    ///
    /// # Errors
    /// The template doesn't fit.
    pub fn render<T: Serialize>(
        &self,
        header: &[&str],
        rows: &[T],
        cells: impl Fn(&T) -> Vec<String>,
    ) -> anyhow::Result<String> {
        match self {
            Self::Table => Ok(output::table(header, rows.iter().map(cells).collect()) + "\n"),
            Self::Json => {
                let lines = rows.iter().map(serde_json::to_string);
                let lines = lines.collect::<Result<Vec<_>, _>>()?;
                Ok(lines.into_iter().map(|line| line + "\n").collect())
            }
            Self::Template(text) => {
                let template = compile(text)?;
                let lines = rows
                    .iter()
                    .map(|row| fill(&template, &serde_json::to_value(row)?));
                let lines = lines.collect::<anyhow::Result<Vec<_>>>()?;
                Ok(lines.into_iter().map(|line| line + "\n").collect())
            }
            Self::TableTemplate(text) => {
                let template = compile(text)?;
                let split = |line: String| line.split('\t').map(str::to_owned).collect::<Vec<_>>();
                let lines = rows
                    .iter()
                    .map(|row| Ok(split(fill(&template, &serde_json::to_value(row)?)?)));
                let lines = lines.collect::<anyhow::Result<Vec<_>>>()?;
                let header = column_names(text);
                let header: Vec<&str> = header.iter().map(String::as_str).collect();
                Ok(output::table(&header, lines) + "\n")
            }
        }
    }
}

/// Fills a template with one value, for `inspect`.
///
/// # Errors
/// The template is none, or asks for what the value doesn't have.
pub fn fill_one(template: &str, value: &serde_json::Value) -> anyhow::Result<String> {
    fill(&compile(template)?, value)
}

/// Writes text to stdout. A reader that has gone is no error.
///
/// # Errors
/// Stdout can't be written to.
pub fn write_out(text: &str) -> anyhow::Result<u8> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(0),
    }
}

/// The header of a table made by a template: the fields it names, column by column.
fn column_names(template: &str) -> Vec<String> {
    template.split('\t').map(column_name).collect()
}

fn column_name(cell: &str) -> String {
    let after = cell
        .find("{{")
        .and_then(|start| cell[start..].find('.').map(|dot| start + dot + 1));
    let field: String = after.map_or_else(String::new, |from| {
        cell[from..]
            .chars()
            .take_while(|c| c.is_ascii_alphanumeric() || *c == '.')
            .collect()
    });
    match field.as_str() {
        "ID" => "ID".to_owned(),
        "PIDs" => "PIDS".to_owned(),
        "" => cell.replace(['{', '}'], ""),
        field => {
            // CreatedAt becomes CREATED AT.
            let mut name = String::new();
            let mut before_lower = false;
            for c in field.rsplit('.').next().unwrap_or(field).chars() {
                if c.is_ascii_uppercase() && before_lower {
                    name.push(' ');
                }
                before_lower = c.is_ascii_lowercase();
                name.push(c.to_ascii_uppercase());
            }
            name
        }
    }
}

fn compile(text: &str) -> anyhow::Result<Template> {
    let mut template = Template::default();
    template.add_func("json", json);
    template.add_func("join", join);
    template.add_func("split", split);
    template.add_func("upper", |arguments| text_function(arguments, str::to_uppercase));
    template.add_func("lower", |arguments| text_function(arguments, str::to_lowercase));
    template
        .parse(text)
        .map_err(|error| anyhow::anyhow!("{}", output::printable(&error.to_string())))
        .with_context(|| format!("--format {text:?}"))?;
    Ok(template)
}

fn fill(template: &Template, value: &serde_json::Value) -> anyhow::Result<String> {
    template
        .render(&Context::from(to_template(value)))
        .map_err(|error| anyhow::anyhow!("{error}"))
        .context("--format: the template asks for what isn't there; `--format json` shows the fields")
}

fn to_template(value: &serde_json::Value) -> Value {
    use serde_json::Value as Json;
    match value {
        Json::Null => Value::Nil,
        Json::Bool(value) => Value::Bool(*value),
        Json::Number(number) => number
            .as_u64()
            .map(Value::from)
            .or_else(|| number.as_i64().map(Value::from))
            .unwrap_or_else(|| Value::from(number.as_f64().unwrap_or_default())),
        Json::String(text) => Value::String(text.clone()),
        Json::Array(list) => Value::Array(list.iter().map(to_template).collect()),
        Json::Object(map) => {
            let map = map.iter().map(|(key, value)| (key.clone(), to_template(value)));
            Value::Map(map.collect::<HashMap<_, _>>())
        }
    }
}

fn from_template(value: &Value) -> serde_json::Value {
    use serde_json::Value as Json;
    match value {
        Value::Bool(value) => Json::Bool(*value),
        Value::String(text) => Json::String(text.clone()),
        Value::Array(list) => list.iter().map(from_template).collect(),
        Value::Object(map) | Value::Map(map) => map
            .iter()
            .map(|(key, value)| (key.clone(), from_template(value)))
            .collect(),
        Value::Number(number) => number
            .as_u64()
            .map(Json::from)
            .or_else(|| number.as_i64().map(Json::from))
            .or_else(|| number.as_f64().map(Json::from))
            .unwrap_or_default(),
        Value::Nil | Value::NoValue | Value::Function(_) => Json::Null,
    }
}

fn json(arguments: &[Value]) -> Result<Value, FuncError> {
    let [value] = arguments else {
        return Err(FuncError::ExactlyXArgs("json".to_owned(), 1));
    };
    Ok(Value::String(from_template(value).to_string()))
}

fn join(arguments: &[Value]) -> Result<Value, FuncError> {
    let [Value::Array(list), Value::String(separator)] = arguments else {
        return Err(FuncError::Generic("join wants a list and a text".to_owned()));
    };
    let texts: Vec<String> = list.iter().map(ToString::to_string).collect();
    Ok(Value::String(texts.join(separator)))
}

fn split(arguments: &[Value]) -> Result<Value, FuncError> {
    let [Value::String(text), Value::String(separator)] = arguments else {
        return Err(FuncError::Generic("split wants two texts".to_owned()));
    };
    let parts = text.split(separator.as_str());
    Ok(Value::Array(
        parts.map(|part| Value::String(part.to_owned())).collect(),
    ))
}

fn text_function(arguments: &[Value], change: fn(&str) -> String) -> Result<Value, FuncError> {
    let [Value::String(text)] = arguments else {
        return Err(FuncError::Generic("upper and lower want a text".to_owned()));
    };
    Ok(Value::String(change(text)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn filled(template: &str) -> String {
        let value = json!({
            "State": {"Status": "running", "Pid": 12, "Running": true},
            "Names": ["a", "b"],
            "Labels": {"x.y": "z"},
            "None": null,
        });
        fill_one(template, &value).unwrap()
    }

    #[test]
    fn templates_are_those_people_write_for_docker() {
        for (template, text) in [
            ("{{.State.Status}}", "running"),
            (
                "{{json .State}}",
                r#"{"Pid":12,"Running":true,"Status":"running"}"#,
            ),
            ("{{range .Names}}{{.}},{{end}}", "a,b,"),
            ("{{index .Labels \"x.y\"}}", "z"),
            ("{{if .State.Running}}up{{else}}down{{end}}", "up"),
            ("{{join .Names \" \"}} {{upper .State.Status}}", "a b RUNNING"),
            ("{{len .Names}} {{printf \"%d\" .State.Pid}}", "2 12"),
            ("{{json .None}}", "null"),
        ] {
            assert_eq!(filled(template), text, "{template}");
        }
    }

    #[test]
    fn what_is_no_template_is_refused_by_name() {
        assert!(PrintFormat::from_str("yaml").is_err());
        for template in ["{{", "{{end}}", "{{.State.Status.Deeper}}", "{{nope .}}"] {
            let error = fill_one(template, &json!({"State": {"Status": "x"}})).unwrap_err();
            assert!(error.to_string().contains("--format"), "{template}: {error:#}");
        }
    }

    #[test]
    fn table_of_a_template_has_a_header() {
        let format: PrintFormat = r"table {{.ID}}\t{{.CreatedAt}}".parse().unwrap();
        let rows = [json!({"ID": "1", "CreatedAt": "now"})];
        let text = format.render(&[], &rows, |_| Vec::new()).unwrap();
        assert_eq!(text, "ID   CREATED AT\n1    now\n");
    }
}
