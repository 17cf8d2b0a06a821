//! The beginning of an answer of HTTP/1.1: bytes of a stranger in, what they say out. Bounded, whatever comes.

use std::io::{self, ErrorKind, Read};

/// The beginning of an answer.
#[derive(Debug)]
pub struct Answer {
    /// The status, if it is HTTP.
    pub status: Option<u16>,
    /// The lines of its head; all that has come, if it is no HTTP.
    pub head: String,
    /// The first [`Answer::BODY_MAX`] bytes behind it, as text.
    pub body: String,
}

impl Answer {
    /// Bytes behind the head that are kept.
    pub const BODY_MAX: usize = 4 << 10;

    /// The value of a header.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.head.lines().filter_map(|line| line.split_once(':'));
        let found = headers.find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.trim())
    }

    /// Whether it says these words, in small letters, anywhere.
    #[must_use]
    pub fn says(&self, words: &str) -> bool {
        let mut texts = [&self.head, &self.body].into_iter();
        texts.any(|text| text.to_ascii_lowercase().contains(words))
    }

    /// Reads until there is enough of it, or it ends.
    pub(super) fn read(stream: &mut impl Read) -> io::Result<Self> {
        let mut bytes = Vec::new();
        let mut part = [0; 1024];
        let mut answer = None;
        while bytes.len() < HEAD_MAX + CODED_MAX {
            match stream.read(&mut part) {
                Ok(0) => break,
                Ok(read) => bytes.extend_from_slice(&part[..read]),
                // Part of an answer says enough; before it, there is the alert of TLS 1.3.
                Err(_) if !bytes.is_empty() => break,
                Err(error) => return Err(error),
            }
            answer = Self::parse(&bytes);
            if answer
                .as_ref()
                .is_some_and(|it| it.body.len() >= Self::BODY_MAX)
            {
                break;
            }
        }
        if bytes.is_empty() {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        Ok(answer.unwrap_or_else(|| Self {
            status: status(&bytes),
            head: String::from_utf8_lossy(&bytes).into_owned(),
            body: String::new(),
        }))
    }

    /// An answer whose head is complete; interim ones before it are left out (RFC 9110 §15.2).
    fn parse(mut bytes: &[u8]) -> Option<Self> {
        loop {
            let end = bytes.windows(END.len()).position(|it| it == END)?;
            let (head, rest) = bytes.split_at_checked(end)?;
            let rest = rest.get(END.len()..)?;
            let status = status(head);
            if status.is_some_and(|status| (100..200).contains(&status) && status != 101) {
                bytes = rest;
                continue;
            }
            let mut answer = Self {
                status,
                head: String::from_utf8_lossy(head).into_owned(),
                body: String::new(),
            };
            let coding = answer.header("transfer-encoding").unwrap_or_default();
            let whole = if coding.eq_ignore_ascii_case("chunked") {
                unchunked(rest)
            } else {
                rest.to_vec()
            };
            let kept = whole.get(..Self::BODY_MAX).unwrap_or(&whole);
            answer.body = String::from_utf8_lossy(kept).into_owned();
            return Some(answer);
        }
    }
}

fn status(head: &[u8]) -> Option<u16> {
    let digits = head.strip_prefix(b"HTTP/1.")?.get(2..5)?;
    str::from_utf8(digits).ok()?.parse().ok()
}

/// What has come of a body in chunks (RFC 9112 §7.1).
fn unchunked(mut coded: &[u8]) -> Vec<u8> {
    let mut whole = Vec::new();
    while let Some(end) = coded.windows(2).position(|it| it == b"\r\n") {
        let size = coded.get(..end).and_then(|line| str::from_utf8(line).ok());
        let size = size.and_then(|line| line.split(';').next());
        let size = size.and_then(|size| usize::from_str_radix(size.trim(), 16).ok());
        let (Some(size @ 1..), Some(rest)) = (size, coded.get(end + 2..)) else {
            break;
        };
        whole.extend_from_slice(rest.get(..size).unwrap_or(rest));
        match size.checked_add(2).and_then(|next| rest.get(next..)) {
            Some(next) => coded = next,
            None => break,
        }
    }
    whole
}

/// Where a head ends.
const END: &[u8] = b"\r\n\r\n";
/// Bytes of heads that are read.
const HEAD_MAX: usize = 16 << 10;
/// Bytes of a body that are read, in its coding.
const CODED_MAX: usize = 2 * Answer::BODY_MAX;

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Answer {
        Answer::read(&mut &*bytes).unwrap()
    }

    #[test]
    fn head_and_body_are_told_apart() {
        let answer = read(b"HTTP/1.1 200 OK\r\nServer: x\r\nLocation: /a\r\n\r\npage");

        assert_eq!((answer.status, answer.body.as_str()), (Some(200), "page"));
        assert_eq!(answer.header("location"), Some("/a"));
    }

    #[test]
    fn interim_answers_are_none() {
        let hints = "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n".repeat(3);
        let answer = read((hints + "HTTP/1.1 403 No\r\n\r\nno").as_bytes());

        assert_eq!((answer.status, answer.body.as_str()), (Some(403), "no"));
    }

    #[test]
    fn chunks_are_put_together() {
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        for (coded, whole) in [
            ("3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n", "abcde"),
            ("5\r\nabc", "abc"),
            ("ffffffffffffffff\r\nabc", "abc"),
            ("fffffffffffffffff\r\nabc", ""),
            ("x\r\n", ""),
        ] {
            assert_eq!(
                read(format!("{head}{coded}").as_bytes()).body,
                whole,
                "{coded}"
            );
        }
    }

    #[test]
    fn a_body_has_the_same_length_however_long_the_head() {
        let body = "x".repeat(1 << 16);
        for head in ["", "A: b\r\n", &format!("A: {}\r\n", "b".repeat(1500))] {
            let answer = read(format!("HTTP/1.1 200 OK\r\n{head}\r\n{body}").as_bytes());
            assert_eq!(answer.body.len(), Answer::BODY_MAX);
        }
    }

    #[test]
    fn what_is_no_http_is_kept_as_it_is() {
        assert_eq!(read(b"220 mail\r\n").head, "220 mail\r\n");
        let endless = read(&vec![b'x'; 1 << 20]);
        assert_eq!((endless.status, endless.body.as_str()), (None, ""));
        assert!(endless.head.len() <= HEAD_MAX + CODED_MAX + 1024);
    }
}
