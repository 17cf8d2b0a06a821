//! Text of a stranger's for a log line: escaped, and of a bounded length.

/// Escapes control characters and quotes, and cuts what is longer than [`FIELD_MAX`] bytes then.
pub(super) fn printable(text: &str) -> String {
    let mut printed = String::new();
    for character in text.chars() {
        let escaped = character.escape_debug().to_string();
        if printed.len() + escaped.len() > FIELD_MAX - ELLIPSIS.len() {
            printed.push_str(ELLIPSIS);
            break;
        }
        printed.push_str(&escaped);
    }
    printed
}

const FIELD_MAX: usize = 256;
const ELLIPSIS: &str = "…";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_short_and_plain_stays_as_it_is() {
        assert_eq!(
            printable("CN=origin-pull, O=Größe"),
            "CN=origin-pull, O=Größe"
        );
        assert_eq!(printable("a\nb\u{1b}[31m"), "a\\nb\\u{1b}[31m");
    }

    proptest! {
        #[test]
        fn no_text_gets_longer_than_its_field_or_out_of_its_line(text in "(?s).{0,400}") {
            let printed = printable(&text);

            prop_assert!(printed.len() <= FIELD_MAX);
            prop_assert!(!printed.contains(char::is_control));
        }
    }
}
