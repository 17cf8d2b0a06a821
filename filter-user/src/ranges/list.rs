//! Parsing: a list as it was fetched in, a [`Feed`] out. One bad line refuses the whole.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;

/// A list of ranges that parsed whole and that nobody has judged yet.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Feed {
    ranges: Vec<IpNet>,
}

impl Feed {
    /// A list that is already parsed.
    pub fn new(ranges: impl IntoIterator<Item = IpNet>) -> Self {
        Self {
            ranges: ranges.into_iter().collect(),
        }
    }

    /// Parses a list as it comes: Cloudflare's API answer, or text with one range per line.
    ///
    /// # Errors
    ///
    /// Returns the first [`ListError`]; there is no partial result.
    pub fn parse(body: &[u8]) -> Result<Self, ListError> {
        let body = std::str::from_utf8(body).map_err(ListError::NotText)?;
        match body
            .trim_start_matches('\u{feff}')
            .trim_start()
            .as_bytes()
            .first()
        {
            Some(b'{') => Self::from_api(body),
            Some(b'<') => Err(ListError::Markup),
            Some(_) | None => Self::from_texts([body]),
        }
    }

    /// Parses texts with one CIDR range per line, blank lines ignored, as one list.
    ///
    /// The format is the one of <https://www.cloudflare.com/ips-v4/>, whose last line ends
    /// without a newline: the texts are never glued together.
    ///
    /// # Errors
    ///
    /// Returns the first [`ListError`]; there is no partial result.
    pub fn from_texts<T: AsRef<str>>(
        texts: impl IntoIterator<Item = T>,
    ) -> Result<Self, ListError> {
        let mut ranges = Vec::new();
        for text in texts {
            let lines = text
                .as_ref()
                .trim_start_matches('\u{feff}')
                .lines()
                .map(str::trim);
            for (index, line) in lines.enumerate().filter(|(_, line)| !line.is_empty()) {
                ranges.push(parse_range(line).map_err(|problem| ListError::Line {
                    line: index + 1,
                    problem,
                })?);
            }
        }
        Ok(Self { ranges })
    }

    /// Parses an answer of Cloudflare's API, `GET /client/v4/ips`.
    ///
    /// # Errors
    ///
    /// Returns the first [`ListError`]. An answer that does not say `success: true`, or that lacks
    /// one of the two families, is refused.
    fn from_api(body: &str) -> Result<Self, ListError> {
        let body = body.trim_start_matches('\u{feff}');
        let answer: ApiAnswer = serde_json::from_str(body).map_err(ListError::Json)?;
        if !answer.success {
            return Err(ListError::Unsuccessful);
        }
        let result = answer
            .result
            .ok_or(ListError::Missing { field: "result" })?;
        let families = [
            ("ipv4_cidrs", result.ipv4_cidrs, true),
            ("ipv6_cidrs", result.ipv6_cidrs, false),
        ];

        let mut ranges = Vec::new();
        for (field, family, is_v4) in families {
            let family = family.ok_or(ListError::Missing { field })?;
            for (index, text) in family.iter().enumerate() {
                let range = parse_range(text)
                    .and_then(|range| match range {
                        IpNet::V4(_) if is_v4 => Ok(range),
                        IpNet::V6(_) if !is_v4 => Ok(range),
                        IpNet::V4(_) | IpNet::V6(_) => Err(RangeProblem::WrongFamily { range }),
                    })
                    .map_err(|problem| ListError::Entry {
                        field,
                        index,
                        problem,
                    })?;
                ranges.push(range);
            }
        }
        Ok(Self { ranges })
    }

    /// The ranges as they were listed.
    #[must_use]
    pub fn ranges(&self) -> &[IpNet] {
        &self.ranges
    }
}

fn parse_range(text: &str) -> Result<IpNet, RangeProblem> {
    let Ok(range) = text.parse::<IpNet>() else {
        return Err(match text.parse::<IpAddr>() {
            Ok(address) => RangeProblem::BareAddress { address },
            Err(_) => RangeProblem::Syntax {
                text: text.chars().take(EXCERPT).collect(),
            },
        });
    };
    // `ipnet` keeps host bits, which would make two spellings of one range.
    if range != range.trunc() {
        return Err(RangeProblem::HostBits { range });
    }
    Ok(range)
}

/// `GET https://api.cloudflare.com/client/v4/ips`; every field is documented as optional.
#[derive(Deserialize)]
struct ApiAnswer {
    result: Option<ApiResult>,
    #[serde(default)]
    success: bool,
}

#[derive(Deserialize)]
struct ApiResult {
    ipv4_cidrs: Option<Vec<String>>,
    ipv6_cidrs: Option<Vec<String>>,
}

/// Why a list does not parse.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListError {
    /// The body is not UTF-8.
    #[error("the list is not text")]
    NotText(#[source] std::str::Utf8Error),
    /// The body is HTML or XML: an error page, a browser check.
    #[error("the list is a web page, not ranges")]
    Markup,
    /// The body begins like JSON but does not parse as the API's answer.
    #[error("the list is not the API's JSON")]
    Json(#[source] serde_json::Error),
    /// The API says that it failed.
    #[error("the API's answer does not say `success: true`")]
    Unsuccessful,
    /// The API's answer lacks a field.
    #[error("the API's answer lacks `{field}`")]
    Missing {
        /// The field.
        field: &'static str,
    },
    /// A line of a text list is no range.
    #[error("line {line}: {problem}")]
    Line {
        /// Line number, from 1.
        line: usize,
        /// What is wrong with it.
        problem: RangeProblem,
    },
    /// An entry of the API's answer is no range.
    #[error("{field}[{index}]: {problem}")]
    Entry {
        /// The array.
        field: &'static str,
        /// Position in the array, from 0.
        index: usize,
        /// What is wrong with it.
        problem: RangeProblem,
    },
}

/// What is wrong with one range of a list.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RangeProblem {
    /// Not a CIDR range.
    #[error("`{}` is not a CIDR range", text.escape_debug())]
    Syntax {
        /// The text as received, cut.
        text: String,
    },
    /// An address without a prefix length.
    #[error("`{address}` has no prefix length")]
    BareAddress {
        /// The address.
        address: IpAddr,
    },
    /// Bits are set behind the prefix.
    #[error("`{range}` has host bits set, did it mean `{}`?", range.trunc())]
    HostBits {
        /// The range as received.
        range: IpNet,
    },
    /// A range in the other family's list.
    #[error("`{range}` is in the wrong family's list")]
    WrongFamily {
        /// The range.
        range: IpNet,
    },
}

/// Characters of a bad line that an error message repeats.
const EXCERPT: usize = 48;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_lists_parse_without_a_trailing_newline() {
        let feed = Feed::from_texts(["131.0.72.0/22", "2400:cb00::/32"]).unwrap();

        assert_eq!(feed.ranges().len(), 2);
    }

    #[test]
    fn crlf_and_a_byte_order_mark_are_harmless() {
        let feed = Feed::parse("\u{feff}131.0.72.0/22\r\n\r\n2400:cb00::/32\r\n".as_bytes());

        assert_eq!(feed.unwrap().ranges().len(), 2);
    }

    #[test]
    fn the_api_answer_parses() {
        let feed = Feed::parse(api(true, "[\"131.0.72.0/22\"]").as_bytes()).unwrap();

        assert_eq!(feed.ranges().len(), 2);
    }

    #[test]
    fn one_bad_line_refuses_the_whole_list() {
        let glued = "103.21.244.0/22\n131.0.72.0/222400:cb00::/32";

        assert_eq!(
            refusal(glued),
            "line 2: `131.0.72.0/222400:cb00::/32` is not a CIDR range"
        );
    }

    #[test]
    fn a_bare_address_and_host_bits_are_refused() {
        assert_eq!(
            refusal("131.0.72.1"),
            "line 1: `131.0.72.1` has no prefix length"
        );
        assert_eq!(
            refusal("131.0.72.1/22"),
            "line 1: `131.0.72.1/22` has host bits set, did it mean `131.0.72.0/22`?"
        );
    }

    #[test]
    fn what_is_not_a_list_is_refused() {
        assert_eq!(refusal("<html>"), "the list is a web page, not ranges");
        assert_eq!(
            refusal("{}"),
            "the API's answer does not say `success: true`"
        );
        assert_eq!(refusal("{\"result\":"), "the list is not the API's JSON");
        assert_eq!(
            refusal(&api(false, "[\"131.0.72.0/22\"]")),
            "the API's answer does not say `success: true`"
        );
        assert_eq!(
            refusal(&api(true, "null")),
            "the API's answer lacks `ipv4_cidrs`"
        );
        assert_eq!(
            refusal(&api(true, "[\"2606:4700::/32\"]")),
            "ipv4_cidrs[0]: `2606:4700::/32` is in the wrong family's list"
        );
        assert_eq!(refusal(&api(true, "7")), "the list is not the API's JSON");
    }

    fn refusal(body: &str) -> String {
        Feed::parse(body.as_bytes()).unwrap_err().to_string()
    }

    fn api(success: bool, v4: &str) -> String {
        format!(
            r#"{{"result":{{"ipv4_cidrs":{v4},"ipv6_cidrs":["2400:cb00::/32"],"etag":"x"}},
                "success":{success},"errors":[],"messages":[]}}"#
        )
    }
}
