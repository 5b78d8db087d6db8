//! Sizes as people write and read them: K, M, G, T are powers of 1024.

/// Units above a byte, each 1024 times the one before.
const UNITS: [char; 5] = ['K', 'M', 'G', 'T', 'P'];

/// Reads `4096`, `64K`, `2G`, `2GiB`. `2GB`, which some read as powers of 1000, is refused.
///
/// # Errors
/// Why it is no size, for people.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let digits_end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, suffix) = text.split_at(digits_end);
    let off = |what: &str| format!("{what}; write bytes, or a whole number with K, M, G or T, such as 2G");
    let number: u64 = digits.parse().map_err(|_| off("not a size"))?;
    let mut letters = suffix.chars();
    let exponent = match letters.next() {
        None => 0,
        Some(letter) => {
            let position = UNITS.iter().position(|unit| *unit == letter.to_ascii_uppercase());
            position.map(|position| position + 1).ok_or_else(|| off("not a size"))?
        }
    };
    match letters.as_str() {
        "" | "iB" | "ib" => {}
        "B" | "b" => return Err(off("powers of 1000 are not known here")),
        _ => return Err(off("not a size")),
    }
    let unit = 1u64.checked_shl(10 * exponent as u32).unwrap_or(0);
    number.checked_mul(unit).ok_or_else(|| off("too large"))
}

/// `2G`, `1.5T`, `512`: at most one decimal, rounded down, so that nothing looks larger than it is.
pub(crate) fn human_size(bytes: u64) -> String {
    let mut exponent = 0;
    while exponent < UNITS.len() && bytes >> (10 * (exponent + 1)) > 0 {
        exponent += 1;
    }
    if exponent == 0 {
        return bytes.to_string();
    }
    let unit = 1u64 << (10 * exponent);
    let (whole, tenths) = (bytes / unit, bytes % unit * 10 / unit);
    let letter = UNITS[exponent - 1];
    if tenths == 0 { format!("{whole}{letter}") } else { format!("{whole}.{tenths}{letter}") }
}

/// The same where nothing is lost by it, or else bytes, so that two sizes never look alike.
pub(crate) fn exact_size(bytes: u64) -> String {
    let short = human_size(bytes);
    if parse_size(&short) == Ok(bytes) { short } else { format!("{bytes} bytes") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_powers_of_1024() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("2K"), Ok(2048));
        assert_eq!(parse_size("2g"), Ok(2 << 30));
        assert_eq!(parse_size("3MiB"), Ok(3 << 20));
        assert_eq!(parse_size("1T"), Ok(1 << 40));
        assert_eq!(parse_size("0"), Ok(0));
    }

    #[test]
    fn what_could_be_misread_is_refused() {
        for bad in ["", "G", "-1", "1.5G", "2GB", "2X", "2 G", "2Gi", "16384P", "99999999999999999999"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_are_printed_short_and_never_larger_than_they_are() {
        assert_eq!(human_size(0), "0");
        assert_eq!(human_size(1023), "1023");
        assert_eq!(human_size(2 << 30), "2G");
        assert_eq!(human_size((3 << 30) / 2), "1.5G");
        assert_eq!(human_size((2 << 30) - 1), "1.9G");
        assert_eq!(human_size(u64::MAX), "16383.9P");
        assert_eq!(
            [exact_size(2 << 30), exact_size((2 << 30) + 1), exact_size(512)],
            ["2G", "2147483649 bytes", "512"]
        );
    }
}
