//! Distinguished names as RFC 5280 §7.1 compares them: a name in, bytes out that are equal when the
//! names are. Case, runs of spaces and the string type make no difference, as for OpenSSL.

use x509_parser::asn1_rs::{Any, Tag};
use x509_parser::prelude::X509Name;

/// A distinguished name in a form that can be compared byte by byte.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(in crate::gate) struct CanonicalName(Vec<RelativeName>);

/// The attributes of one relative distinguished name, which is a set: in an order of our own.
type RelativeName = Vec<(Vec<u8>, AttributeValue)>;

#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum AttributeValue {
    Text(String),
    /// Something that is not text: its tag and content.
    Other(u32, Vec<u8>),
}

impl CanonicalName {
    pub(in crate::gate) fn of(name: &X509Name<'_>) -> Self {
        let relative = name.iter_rdn().map(|relative| {
            let attributes = relative.iter().map(|attribute| {
                let value = AttributeValue::of(attribute.attr_value());
                (attribute.attr_type().as_bytes().to_vec(), value)
            });
            let mut attributes: RelativeName = attributes.collect();
            attributes.sort_unstable();
            attributes
        });
        Self(relative.collect())
    }
}

impl AttributeValue {
    fn of(any: &Any<'_>) -> Self {
        match text(any) {
            Some(text) => Self::Text(normalized(&text)),
            None => Self::Other(any.tag().0, any.data.to_vec()),
        }
    }
}

/// The characters of a string of any type that names are written in.
fn text(any: &Any<'_>) -> Option<String> {
    let data = any.data;
    match any.tag() {
        Tag::Utf8String | Tag::PrintableString | Tag::Ia5String | Tag::VisibleString => {
            String::from_utf8(data.to_vec()).ok()
        }
        // OpenSSL reads T.61 as Latin-1, and so do the CAs that write it.
        Tag::T61String => Some(data.iter().copied().map(char::from).collect()),
        Tag::BmpString => {
            let (units, rest) = data.as_chunks();
            let units: Vec<u16> = units.iter().copied().map(u16::from_be_bytes).collect();
            rest.is_empty().then(|| String::from_utf16(&units).ok())?
        }
        Tag::UniversalString => {
            let (points, rest) = data.as_chunks();
            let points = points.iter().copied().map(u32::from_be_bytes);
            rest.is_empty()
                .then(|| points.map(char::from_u32).collect())?
        }
        _ => None,
    }
}

/// Lower case, without spaces around it, and one where there are several.
fn normalized(text: &str) -> String {
    let words: Vec<String> = text
        .split_ascii_whitespace()
        .map(str::to_lowercase)
        .collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use x509_parser::prelude::FromDer as _;

    use super::*;

    /// A name of one common name, of this string type.
    fn common_name(tag: u8, value: &[u8]) -> CanonicalName {
        let wrapped = |kind: u8, content: &[u8]| {
            let length = u8::try_from(content.len()).unwrap();
            [&[kind, length], content].concat()
        };
        let attribute = [&[6, 3, 0x55, 4, 3], wrapped(tag, value).as_slice()].concat();
        let name = wrapped(0x30, &wrapped(0x31, &wrapped(0x30, &attribute)));
        let (_, name) = X509Name::from_der(&name).unwrap();
        CanonicalName::of(&name)
    }

    #[test]
    fn case_spaces_and_string_types_make_no_difference() {
        let name = common_name(12, b"Acme CA");
        let bmp: Vec<u8> = "acme ca"
            .encode_utf16()
            .flat_map(u16::to_be_bytes)
            .collect();

        assert_eq!(name, common_name(19, b"Acme CA"));
        assert_eq!(name, common_name(22, b" ACME   ca "));
        assert_eq!(name, common_name(20, b"acme CA"));
        assert_eq!(name, common_name(30, &bmp));
        assert_ne!(name, common_name(12, b"AcmeCA"));
        assert_ne!(name, common_name(4, b"Acme CA"));
    }

    #[test]
    fn characters_beyond_ascii_are_the_same_in_every_encoding() {
        let name = common_name(12, "Zürich".as_bytes());

        assert_eq!(name, common_name(20, b"Z\xfcrich"));
        assert_ne!(name, common_name(12, b"Zurich"));
    }
}
