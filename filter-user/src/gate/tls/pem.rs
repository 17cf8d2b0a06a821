//! PEM files: text in, sections out, as OpenSSL reads them. A line that looks like the edge of a
//! section and is none is an error: what it hides would not be missed.

use rustls::pki_types::pem::{PemObject as _, SectionKind};
use thiserror::Error;

/// A section's content, and where it begins.
#[derive(Debug, Eq, PartialEq)]
pub(in crate::gate) struct Section {
    pub(in crate::gate) kind: PemKind,
    /// The label between the dashes.
    pub(in crate::gate) label: String,
    /// The line of its beginning, from 1.
    pub(in crate::gate) line: usize,
    /// DER.
    pub(in crate::gate) content: Vec<u8>,
}

/// What a section holds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in crate::gate) enum PemKind {
    Certificate,
    RevocationList,
    /// A private key of any format, the encrypted ones among them.
    Key,
    /// What comes with keys and is not needed: parameters, public keys, requests.
    Companion,
    Other,
}

/// Why a text is not PEM.
#[derive(Debug, Eq, Error, PartialEq)]
pub(in crate::gate) enum PemError {
    #[error(
        "line {0} looks like the edge of a section, and is none: it must be alone on its line, \
         like `-----BEGIN CERTIFICATE-----`"
    )]
    Edge(usize),
    #[error("the section that begins in line {0} does not end")]
    Unfinished(usize),
    #[error("the section that begins in line {0} is not Base64")]
    Content(usize),
}

/// Reads all sections of a text.
///
/// # Errors
///
/// Returns the first line that is not right.
pub(in crate::gate) fn sections(text: &[u8]) -> Result<Vec<Section>, PemError> {
    let mut sections = Vec::new();
    let mut open: Option<(usize, &str, Vec<&[u8]>)> = None;
    for (index, line) in text.split(|byte| *byte == b'\n').enumerate() {
        let number = index + 1;
        let line = line.trim_ascii_end();
        open = match (edge(line), open.take()) {
            (Some(Edge::Begin(label)), None) => Some((number, label, Vec::new())),
            (Some(Edge::End(end)), Some((begin, label, lines))) if end == label => {
                sections.push(section(begin, label, &lines)?);
                None
            }
            (Some(Edge::Begin(_) | Edge::End(_)), _) => return Err(PemError::Edge(number)),
            (None, _) if resembles_edge(line) => return Err(PemError::Edge(number)),
            (None, None) => None,
            (None, Some((begin, label, mut lines))) => {
                lines.push(line);
                Some((begin, label, lines))
            }
        };
    }
    match open {
        Some((begin, _, _)) => Err(PemError::Unfinished(begin)),
        None => Ok(sections),
    }
}

enum Edge<'a> {
    Begin(&'a str),
    End(&'a str),
}

fn edge(line: &[u8]) -> Option<Edge<'_>> {
    let line = std::str::from_utf8(line).ok()?;
    let inner = line.strip_prefix(DASHES)?.strip_suffix(DASHES)?;
    let begin = inner.strip_prefix("BEGIN ").map(Edge::Begin);
    let edge = begin.or_else(|| inner.strip_prefix("END ").map(Edge::End));
    let is_label =
        |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || b" .".contains(&byte);
    edge.filter(|_| inner.bytes().all(is_label))
}

/// Whether an edge was meant: glued to another, indented, with a byte order mark or other dashes.
fn resembles_edge(line: &[u8]) -> bool {
    let line = String::from_utf8_lossy(line).to_ascii_uppercase();
    let any = |words: &[&str]| words.iter().any(|word| line.contains(word));
    let start = line.trim_start_matches(|first: char| first.is_whitespace() || first == BOM);
    let behind = start.trim_start_matches(OTHER_DASHES);
    let begins = behind != start && (behind.starts_with("BEGIN ") || behind.starts_with("END "));
    let marks = ["-----BEGIN ", "-----END "];
    // Whatever the label is, another reader takes such a line for an edge, and what is behind it for its
    // section's.
    let mut starts = start.split('\r').map(str::trim_start);
    if starts.any(|part| marks.iter().any(|mark| part.starts_with(mark))) {
        return true;
    }
    (begins || any(&marks)) && any(&["CERTIFICATE", "CRL", "KEY", "PARAMETERS"])
}

/// One section for the library, which knows fewer labels than OpenSSL does.
fn section(line: usize, label: &str, lines: &[&[u8]]) -> Result<Section, PemError> {
    let kind = match label {
        "CERTIFICATE" | "X509 CERTIFICATE" | "TRUSTED CERTIFICATE" => PemKind::Certificate,
        "X509 CRL" => PemKind::RevocationList,
        "PUBLIC KEY"
        | "EC PARAMETERS"
        | "DH PARAMETERS"
        | "X9.42 DH PARAMETERS"
        | "DSA PARAMETERS"
        | "CERTIFICATE REQUEST"
        | "NEW CERTIFICATE REQUEST" => PemKind::Companion,
        label if label.ends_with("PRIVATE KEY") => PemKind::Key,
        _ => PemKind::Other,
    };
    // An encrypted key has headers, which are no Base64, and its content is of no use.
    if lines.iter().any(|text| text.contains(&b':')) {
        return Ok(Section {
            kind,
            label: label.to_owned(),
            line,
            content: Vec::new(),
        });
    }
    let mut text = b"-----BEGIN CERTIFICATE-----\n".to_vec();
    text.extend(lines.join(&b'\n'));
    text.extend(b"\n-----END CERTIFICATE-----\n");
    let (_, mut content) =
        <(SectionKind, Vec<u8>)>::from_pem_slice(&text).map_err(|_bad| PemError::Content(line))?;
    if label == "TRUSTED CERTIFICATE" {
        content.truncate(der_length(&content).ok_or(PemError::Content(line))?);
    }
    Ok(Section {
        kind,
        label: label.to_owned(),
        line,
        content,
    })
}

/// How long the first element is: behind a trusted certificate OpenSSL keeps what it is trusted
/// for.
fn der_length(der: &[u8]) -> Option<usize> {
    let length = match *der.get(1)? {
        short @ ..0x80 => 2 + usize::from(short),
        long => {
            let count = usize::from(long & 0x7f);
            let bytes = der.get(2..2 + count).filter(|_| count <= 4)?;
            let length = bytes
                .iter()
                .fold(0, |sum, byte| sum << 8 | usize::from(*byte));
            2 + count + length
        }
    };
    (length <= der.len()).then_some(length)
}

const DASHES: &str = "-----";
/// What editors and web pages make of them, and they themselves.
const OTHER_DASHES: [char; 6] = [
    '-', '\u{2010}', '\u{2011}', '\u{2012}', '\u{2013}', '\u{2014}',
];
/// A byte order mark.
const BOM: char = '\u{feff}';

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n";

    fn kinds(text: &str) -> Result<Vec<PemKind>, PemError> {
        let sections = sections(text.as_bytes())?;
        Ok(sections.iter().map(|section| section.kind).collect())
    }

    #[test]
    fn sections_are_read_with_text_around_them() {
        let text = format!(
            "Bag Attributes\r\n  friendlyName: backend key - begin of it\n{ONE}\n# send this key -\n{}{}",
            ONE.replace("CERTIFICATE", "X509 CRL")
                .replace('\n', " \r\n"),
            ONE.replace("CERTIFICATE", "EC PRIVATE KEY").trim_end(),
        );

        assert_eq!(
            kinds(&text),
            Ok(vec![
                PemKind::Certificate,
                PemKind::RevocationList,
                PemKind::Key
            ])
        );
        let read = sections(text.as_bytes()).unwrap();
        assert_eq!(read[0].content, [0x30, 0]);
        assert_eq!(read[1].line, 8);
    }

    #[test]
    fn a_trusted_certificate_is_read_without_what_it_is_trusted_for() {
        let text = ONE.replace("CERTIFICATE", "TRUSTED CERTIFICATE");
        let text = text.replace("MAA=", "MAAwAA==");

        assert_eq!(sections(text.as_bytes()).unwrap()[0].content, [0x30, 0]);
    }

    #[test]
    fn what_looks_like_an_edge_and_is_none_is_refused_by_line() {
        let end = "-----END CERTIFICATE-----";
        for (text, error) in [
            (ONE.replace("-----\nMAA=", "-----MAA="), PemError::Edge(1)),
            (format!("{}{ONE}", ONE.trim_end()), PemError::Edge(3)),
            (format!("{ONE}  {ONE}"), PemError::Edge(4)),
            (format!("\u{feff}{ONE}"), PemError::Edge(1)),
            (ONE.replace("-----BEGIN", "----BEGIN"), PemError::Edge(1)),
            (
                ONE.replace("-----BEGIN", "\u{2014}BEGIN"),
                PemError::Edge(1),
            ),
            (ONE.replace("BEGIN", "begin"), PemError::Edge(1)),
            (
                ONE.replace(end, "-----END X509 CRL-----"),
                PemError::Edge(3),
            ),
            (ONE.replace(end, ""), PemError::Unfinished(1)),
            (format!("{}{ONE}", ONE.replace(end, "")), PemError::Edge(4)),
            (ONE.replace("MAA=", "M*A="), PemError::Content(1)),
            (format!("-----BEGIN a note\nMAA=\n{ONE}"), PemError::Edge(1)),
            (format!("text\r-----END ?-----\n{ONE}"), PemError::Edge(1)),
            (ONE.replace('\n', "\r"), PemError::Edge(1)),
            (format!("{end}\n{ONE}"), PemError::Edge(1)),
        ] {
            assert_eq!(kinds(&text), Err(error), "{text}");
        }
    }
}
