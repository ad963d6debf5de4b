//! Text in the query of a request (RFC 3986, section 2.1).

/// Each byte as `%41`.
pub(super) fn encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02x}")).collect()
}

/// Text with bytes as `%41`; `None` if it is not written so, or no UTF-8.
pub(super) fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(if byte == b'%' {
            let digits = [rest.next()?, rest.next()?];
            let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
            digit(digits[0])? << 4 | digit(digits[1])?
        } else {
            byte
        });
    }
    String::from_utf8(bytes).ok()
}
