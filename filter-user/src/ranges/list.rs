//! Parsing: a list as it was fetched in, a [`Feed`] out. One bad line refuses the whole.

use std::borrow::Cow;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;

/// How a list is written.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Format {
    /// Cloudflare's API answer, a JSON array of ranges, or text with one range per line: whichever it looks
    /// like.
    #[default]
    Cloudflare,
    /// Text in two parts: the IPv4 ranges, and the IPv6 ranges.
    ByFamily,
    /// The ranges of JD Cloud in Cloudflare's API answer to `networks=jdcloud`.
    Jdcloud,
    /// JSON, with arrays of ranges at these pointers (RFC 6901).
    Pointers(Vec<String>),
    /// AWS's `ip-ranges.json`, and of it the servers of CloudFront that origins see.
    CloudFront,
}

/// A list of ranges that parsed whole and is not judged yet.
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

    /// Parses a list as it comes.
    ///
    /// # Errors
    ///
    /// Returns the first [`ListError`]; there is no partial result.
    pub fn parse(body: &[u8], format: &Format) -> Result<Self, ListError> {
        let body = std::str::from_utf8(body).map_err(ListError::NotText)?;
        let body = body.trim_start_matches('\u{feff}');
        let first = body.trim_start().as_bytes().first();
        match (format, first) {
            (_, Some(b'<')) => Err(ListError::Markup),
            (Format::Cloudflare, Some(b'{')) => Self::from_api(body),
            (Format::Cloudflare, Some(b'[')) => Self::from_pointers(body, &[String::new()]),
            (Format::Cloudflare | Format::ByFamily, Some(_) | None) => Self::from_texts([body]),
            (Format::Jdcloud, _) => Self::from_jdcloud(body),
            (Format::Pointers(pointers), _) => Self::from_pointers(body, pointers),
            (Format::CloudFront, _) => Self::from_aws(body),
        }
    }

    /// Parses texts with one CIDR range or address per line as one list. `#` begins a comment.
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
            let text = text.as_ref().trim_start_matches('\u{feff}');
            for (index, line) in text.lines().enumerate() {
                let range = line.split('#').next().unwrap_or_default().trim();
                if range.is_empty() {
                    continue;
                }
                ranges.push(parse_range(range).map_err(|problem| ListError::Line {
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
        let result = api_result(body)?;
        let mut ranges = array("ipv4_cidrs", result.ipv4_cidrs)?;
        check_family("ipv4_cidrs", &ranges, is_v4)?;
        let v6 = array("ipv6_cidrs", result.ipv6_cidrs)?;
        check_family("ipv6_cidrs", &v6, is_v6)?;
        ranges.extend(v6);
        Ok(Self { ranges })
    }

    /// Checks that a part of a list, counted from 0, holds what belongs there.
    ///
    /// # Errors
    ///
    /// Returns the first range that belongs into another part.
    pub fn check_part(&self, part: usize, format: &Format) -> Result<(), ListError> {
        match (format, part) {
            (Format::ByFamily, 0) => check_family("IPv4 part", &self.ranges, is_v4),
            (Format::ByFamily, _) => check_family("IPv6 part", &self.ranges, is_v6),
            (
                Format::Cloudflare | Format::Jdcloud | Format::Pointers(_) | Format::CloudFront,
                _,
            ) => Ok(()),
        }
    }

    /// Parses what the API answers of JD Cloud when `networks=jdcloud` was asked for.
    fn from_jdcloud(body: &str) -> Result<Self, ListError> {
        let result = api_result(body)?;
        let ranges = array("jdcloud_cidrs", result.jdcloud_cidrs)?;
        Ok(Self { ranges })
    }

    /// Parses JSON with arrays of ranges at certain places.
    fn from_pointers(body: &str, pointers: &[String]) -> Result<Self, ListError> {
        let json: Value = serde_json::from_str(body).map_err(ListError::Json)?;
        if json.get("success").is_some_and(|success| *success != true) {
            return Err(ListError::Unsuccessful);
        }
        let mut ranges = Vec::new();
        for pointer in pointers {
            let found = json.pointer(pointer).map(Vec::<String>::deserialize);
            let texts = found.transpose().map_err(ListError::Json)?;
            ranges.extend(array(pointer, texts)?);
        }
        Ok(Self { ranges })
    }

    /// Parses AWS's list of everything.
    ///
    /// <https://docs.aws.amazon.com/vpc/latest/userguide/aws-ip-syntax.html>
    fn from_aws(body: &str) -> Result<Self, ListError> {
        let list: AwsList<'_> = serde_json::from_str(body).map_err(ListError::Json)?;
        let v4 = list.prefixes.iter();
        let v4 = v4.map(|prefix| (&prefix.service, &prefix.ip_prefix));
        let v6 = list.ipv6_prefixes.iter();
        let v6 = v6.map(|prefix| (&prefix.service, &prefix.ipv6_prefix));
        let texts = v4
            .chain(v6)
            .filter(|(service, _)| *service == ORIGIN_FACING);
        let texts = texts.map(|(_, range)| range.clone().into_owned()).collect();
        let ranges = array(ORIGIN_FACING, Some(texts))?;
        Ok(Self { ranges })
    }

    /// The ranges as they were listed.
    #[must_use]
    pub fn ranges(&self) -> &[IpNet] {
        &self.ranges
    }
}

/// A range in its one spelling, or an address as the range of it alone: `ipnet` takes leading zeros, which others
/// read as octal, and IPv4-mapped addresses, which the kernel never looks up.
#[must_use]
pub fn exact(text: &str) -> Option<IpNet> {
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (address, Some(length)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().ok()?;
    if address.to_canonical() != address {
        return None;
    }
    match length {
        None => Some(IpNet::from(address)),
        Some(length) => {
            let number: u8 = length.parse().ok()?;
            let is_exact = number.to_string() == length;
            is_exact.then(|| IpNet::new(address, number).ok()).flatten()
        }
    }
}

fn parse_range(text: &str) -> Result<IpNet, RangeProblem> {
    let range = exact(text).ok_or_else(|| RangeProblem::Syntax {
        text: text.chars().take(EXCERPT).collect(),
    })?;
    // `ipnet` keeps host bits, which would make two spellings of one range.
    if range != range.trunc() {
        return Err(RangeProblem::HostBits { range });
    }
    Ok(range)
}

fn api_result(body: &str) -> Result<ApiResult, ListError> {
    let answer: ApiAnswer = serde_json::from_str(body).map_err(ListError::Json)?;
    if !answer.success {
        return Err(ListError::Unsuccessful);
    }
    answer.result.ok_or_else(|| ListError::Missing {
        field: "result".to_owned(),
    })
}

/// Parses the ranges of one array.
fn array(field: &str, texts: Option<Vec<String>>) -> Result<Vec<IpNet>, ListError> {
    let texts = texts.ok_or_else(|| ListError::Missing {
        field: field.to_owned(),
    })?;
    let ranges = texts.iter().enumerate().map(|(index, text)| {
        parse_range(text).map_err(|problem| ListError::Entry {
            field: field.to_owned(),
            index,
            problem,
        })
    });
    ranges.collect()
}

fn is_v4(range: &IpNet) -> bool {
    matches!(range, IpNet::V4(_))
}

fn is_v6(range: &IpNet) -> bool {
    matches!(range, IpNet::V6(_))
}

fn check_family(
    field: &str,
    ranges: &[IpNet],
    belongs: impl Fn(&IpNet) -> bool,
) -> Result<(), ListError> {
    match ranges.iter().enumerate().find(|(_, range)| !belongs(range)) {
        Some((index, range)) => Err(ListError::Entry {
            field: field.to_owned(),
            index,
            problem: RangeProblem::WrongFamily { range: *range },
        }),
        None => Ok(()),
    }
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
    jdcloud_cidrs: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct AwsList<'a> {
    #[serde(borrow)]
    prefixes: Vec<AwsPrefix<'a>>,
    #[serde(borrow)]
    ipv6_prefixes: Vec<AwsPrefixV6<'a>>,
}

#[derive(Deserialize)]
struct AwsPrefix<'a> {
    #[serde(borrow)]
    ip_prefix: Cow<'a, str>,
    #[serde(borrow)]
    service: Cow<'a, str>,
}

#[derive(Deserialize)]
struct AwsPrefixV6<'a> {
    #[serde(borrow)]
    ipv6_prefix: Cow<'a, str>,
    #[serde(borrow)]
    service: Cow<'a, str>,
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
    /// The body is not the JSON that was due.
    #[error("the list is not the JSON that was expected")]
    Json(#[source] serde_json::Error),
    /// The API says that it failed.
    #[error("the answer has no `success: true`")]
    Unsuccessful,
    /// The answer lacks a field.
    #[error("the answer lacks `{field}`")]
    Missing {
        /// The field, or the pointer to it.
        field: String,
    },
    /// A line of a text list is no range.
    #[error("line {line}: {problem}")]
    Line {
        /// Line number, from 1.
        line: usize,
        /// What is wrong with it.
        problem: RangeProblem,
    },
    /// An entry of the answer is no range.
    #[error("{field}[{index}]: {problem}")]
    Entry {
        /// The array.
        field: String,
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
    /// Neither a CIDR range nor an address.
    #[error("`{}` is not a CIDR range or an address", text.escape_debug())]
    Syntax {
        /// The text as received, cut.
        text: String,
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

/// What AWS calls the servers by which CloudFront comes to origins:
/// <https://docs.aws.amazon.com/AmazonCloudFront/latest/DeveloperGuide/LocationsOfEdgeServers.html>
const ORIGIN_FACING: &str = "CLOUDFRONT_ORIGIN_FACING";
/// Characters of a bad line that an error message repeats.
const EXCERPT: usize = 48;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_text_lists_parse_without_a_trailing_newline() {
        let feed = Feed::from_texts(["# v4\n\n131.0.72.0/22", "2400:cb00::/32"]).unwrap();

        assert_eq!(feed.ranges().len(), 2);
    }

    #[test]
    fn a_range_has_one_spelling() {
        for text in ["64.0.0.0/24", "2001:db8::/32", "2001:0db8::/32", "64.0.0.0"] {
            assert!(exact(text).is_some(), "{text}");
        }
        for text in [
            "064.0.0.0/24",
            "64.0.0.0/024",
            "64.0.0.0/+24",
            "2001:db8::/032",
            "::ffff:64.0.0.0/120",
            "::ffff:4000:0/128",
            "064.0.0.0",
            "::ffff:64.0.0.0",
            "64.0.0.0/33",
        ] {
            assert_eq!(exact(text), None, "{text}");
        }
    }

    #[test]
    fn crlf_and_a_byte_order_mark_are_harmless() {
        let feed = Feed::parse(
            "\u{feff}131.0.72.0/22\r\n\r\n2400:cb00::/32\r\n".as_bytes(),
            &Format::Cloudflare,
        );

        assert_eq!(feed.unwrap().ranges().len(), 2);
    }

    #[test]
    fn the_api_answer_parses() {
        let feed = Feed::parse(
            api(true, "[\"131.0.72.0/22\"]").as_bytes(),
            &Format::Cloudflare,
        )
        .unwrap();

        assert_eq!(feed.ranges().len(), 2);
    }

    #[test]
    fn one_bad_line_refuses_the_whole_list() {
        let glued = "103.21.244.0/22\n131.0.72.0/222400:cb00::/32";

        assert_eq!(
            refusal(glued),
            "line 2: `131.0.72.0/222400:cb00::/32` is not a CIDR range or an address"
        );
    }

    #[test]
    fn addresses_comments_and_a_bare_array_are_read() {
        let expected = ["131.0.72.0/22", "89.187.188.227/32", "2400:cb00::1/128"];
        let expected = expected.map(|range| range.parse().unwrap());
        for body in [
            "131.0.72.0/22 # a range\n#\n89.187.188.227\t\n2400:cb00::1#an address\n",
            r#"["131.0.72.0/22", "89.187.188.227", "2400:cb00::1"]"#,
        ] {
            let feed = Feed::parse(body.as_bytes(), &Format::Cloudflare);
            assert_eq!(feed.unwrap().ranges(), expected, "{body}");
        }
        assert_eq!(
            refusal(r#"["131.0.72.0/22", 7]"#),
            "the list is not the JSON that was expected"
        );
        assert_eq!(
            refusal(r#"["131.0.72.0/22", "x"]"#),
            "[1]: `x` is not a CIDR range or an address"
        );
    }

    #[test]
    fn host_bits_are_refused() {
        assert_eq!(
            refusal("131.0.72.1/22"),
            "line 1: `131.0.72.1/22` has host bits set, did it mean `131.0.72.0/22`?"
        );
    }

    #[test]
    fn what_is_not_a_list_is_refused() {
        assert_eq!(refusal("<html>"), "the list is a web page, not ranges");
        assert_eq!(refusal("{}"), "the answer has no `success: true`");
        assert_eq!(
            refusal("{\"result\":"),
            "the list is not the JSON that was expected"
        );
        assert_eq!(
            refusal(&api(false, "[\"131.0.72.0/22\"]")),
            "the answer has no `success: true`"
        );
        assert_eq!(refusal(&api(true, "null")), "the answer lacks `ipv4_cidrs`");
        assert_eq!(
            refusal(&api(true, "[\"2606:4700::/32\"]")),
            "ipv4_cidrs[0]: `2606:4700::/32` is in the wrong family's list"
        );
        assert_eq!(
            refusal(&api(true, "7")),
            "the list is not the JSON that was expected"
        );
    }

    #[test]
    fn the_extra_network_is_taken_from_its_own_field() {
        let body = api(true, "[\"131.0.72.0/22\"]")
            .replace("\"etag\"", "\"jdcloud_cidrs\":[\"64.0.0.0/24\"],\"etag\"");

        let feed = Feed::parse(body.as_bytes(), &Format::Jdcloud).unwrap();

        assert_eq!(feed.ranges(), ["64.0.0.0/24".parse().unwrap()]);
    }

    #[test]
    fn pointers_lead_to_the_arrays_of_any_json() {
        let fastly = br#"{"addresses":["23.235.32.0/20"],"ipv6_addresses":["2a04:4e40::/32"]}"#;
        let parse = |pointers: [&str; 2]| {
            let pointers = pointers.map(str::to_owned).to_vec();
            Feed::parse(fastly, &Format::Pointers(pointers)).map_err(|error| error.to_string())
        };

        let feed = parse(["/addresses", "/ipv6_addresses"]).unwrap();
        assert_eq!(feed.ranges().len(), 2);
        assert_eq!(
            parse(["/addresses", "/gone"]).unwrap_err(),
            "the answer lacks `/gone`"
        );
        assert_eq!(
            parse(["/addresses", ""]).unwrap_err(),
            "the list is not the JSON that was expected"
        );
    }

    #[test]
    fn of_all_that_aws_has_only_what_origins_see_is_taken() {
        let body = br#"{"syncToken":"0","createDate":"x","prefixes":[
            {"ip_prefix":"3.0.0.0/15","region":"x","service":"EC2","network_border_group":"x"},
            {"ip_prefix":"13.124.199.0/24","region":"x","service":"CLOUDFRONT_ORIGIN_FACING",
             "network_border_group":"x"}],
            "ipv6_prefixes":[{"ipv6_prefix":"2600:9000::/28","region":"x","service":"CLOUDFRONT"}]}"#;

        let feed = Feed::parse(body, &Format::CloudFront).unwrap();

        assert_eq!(feed.ranges(), ["13.124.199.0/24".parse().unwrap()]);
    }

    proptest! {
        #[test]
        fn no_body_makes_the_parser_panic(
            body in prop::collection::vec(any::<u8>(), 0..200),
            splice in "[\\[\\]{}:,\"/.0-9a-f\n\r \u{feff}]{0,60}",
            at in 0_usize..400,
        ) {
            let good = api(true, "[\"131.0.72.0/22\"]");
            let mut spoilt = good.into_bytes();
            let at = at.min(spoilt.len());
            spoilt.splice(at..at, splice.bytes());
            let pointers = ["/result/ipv4_cidrs", "", "/result"].map(str::to_owned).to_vec();
            let formats = [
                Format::Cloudflare,
                Format::Jdcloud,
                Format::Pointers(pointers),
                Format::CloudFront,
            ];
            for format in &formats {
                for bytes in [&body, &spoilt, splice.as_bytes()] {
                    if let Ok(feed) = Feed::parse(bytes, format) {
                        // What parses is in its one spelling.
                        prop_assert!(feed.ranges().iter().all(|range| *range == range.trunc()));
                    }
                }
            }
        }
    }

    fn refusal(body: &str) -> String {
        Feed::parse(body.as_bytes(), &Format::Cloudflare)
            .unwrap_err()
            .to_string()
    }

    fn api(success: bool, v4: &str) -> String {
        format!(
            r#"{{"result":{{"ipv4_cidrs":{v4},"ipv6_cidrs":["2400:cb00::/32"],"etag":"x"}},
                "success":{success},"errors":[],"messages":[]}}"#
        )
    }
}
