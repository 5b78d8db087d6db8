//! The table of `docs/nbd-conformance.md` is about tests that exist.

use std::fs;
use std::path::Path;

/// The tests that the table names: file and function.
fn named_tests(table: &str) -> Vec<(&str, &str)> {
    let quoted = table.split('`').skip(1).step_by(2);
    quoted.filter_map(|word| word.split_once("::")).filter(|(file, _)| file.ends_with(".rs")).collect()
}

/// Whether the file has a test of that name: a function with the attribute, or one of the lab's list.
fn has_test(source: &str, name: &str) -> bool {
    let head = format!("fn {name}()");
    let is_test = |at: usize| {
        let before = source[..at].trim_end().trim_end_matches("async").trim_end();
        let attribute = before.lines().last().unwrap_or_default().trim_start();
        attribute == "#[test]" || attribute.starts_with("#[tokio::test")
    };
    let is_function = source.match_indices(&head).any(|(at, _)| is_test(at));
    is_function || source.contains("Test::new(") && source.contains(&format!("::{name}\""))
}

#[test]
fn every_test_that_the_table_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let table = fs::read_to_string(root.join("docs/nbd-conformance.md")).unwrap();
    let named = named_tests(&table);
    assert!(named.len() > 150, "only {} tests are named: is the table still read?", named.len());
    let missing: Vec<_> = named
        .iter()
        .filter(|(file, name)| {
            !fs::read_to_string(root.join(file)).is_ok_and(|source| has_test(&source, name))
        })
        .collect();
    assert!(missing.is_empty(), "the table names tests that do not exist: {missing:#?}");
}

#[test]
fn every_row_names_a_test_or_a_reason() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let table = fs::read_to_string(root.join("docs/nbd-conformance.md")).unwrap();
    let rows = table.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| ---"));
    let mut count = 0;
    for row in rows.filter(|row| !row.contains("| proved by |")) {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        assert_eq!(cells.len(), 3, "{row}");
        assert!(!named_tests(cells[2]).is_empty() || (cells[2] == "–" && cells[1].len() > 40), "{row}");
        count += 1;
    }
    assert!(count > 90, "only {count} rows");
}

#[test]
fn a_test_that_is_gone_would_be_noticed() {
    let source = "#[test]\nfn there() {}\nfn no_test() {}\nTest::new(\"area::in_the_lab\", run)";
    assert!(has_test(source, "there") && has_test(source, "in_the_lab"));
    assert!(!has_test(source, "no_test") && !has_test(source, "gone"));
}
