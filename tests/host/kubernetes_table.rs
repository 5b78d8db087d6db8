//! The tables of `docs/kubernetes.md`, of what drivers are blamed for and of what is killed, name tests that exist.

use std::fs;
use std::path::Path;

/// Rows of other drivers' complaints that were gone through, 1 to 15 and 3b; and those of encrypted volumes that are killed while they are made.
const ROWS_MIN: usize = 16 + 6;

/// Rows of the tables that say what proves them: cells, without those of the heads.
fn rows(page: &str) -> Vec<Vec<&str>> {
    let tables = page.split("| proved by |").skip(1);
    // Each ends with its first line that is none of a table.
    let lines = tables.flat_map(|table| table.lines().skip(1).take_while(|line| line.starts_with('|')));
    lines
        .filter(|line| !line.starts_with("| ---"))
        .map(|row| row.trim_matches('|').split('|').map(str::trim).collect())
        .collect()
}

/// The tests that a cell names: file and function.
fn named_tests(cell: &str) -> Vec<(&str, &str)> {
    cell.split('`').skip(1).step_by(2).filter_map(|word| word.split_once("::")).collect()
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
fn every_complaint_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let page = fs::read_to_string(root.join("docs/kubernetes.md")).unwrap();
    let rows = rows(&page);
    assert!(rows.len() >= ROWS_MIN, "only {} rows: is the table still read?", rows.len());
    let mut missing = Vec::new();
    for row in rows {
        assert_eq!(row.len(), 4, "{row:?}");
        let named = named_tests(row[3]);
        assert!(!named.is_empty(), "row {} names no test", row[0]);
        for (file, name) in named {
            if !fs::read_to_string(root.join(file)).is_ok_and(|source| has_test(&source, name)) {
                missing.push(format!("{}: {file}::{name}", row[0]));
            }
        }
    }
    assert!(missing.is_empty(), "the table names tests that do not exist:\n{}", missing.join("\n"));
}

#[test]
fn a_row_is_read_and_a_test_that_is_gone_is_noticed() {
    let page = "| a | b |\n| --- | --- |\n| x | y |\n\n| # | what | here | proved by |\n| --- | --- | --- | --- |\n\
                | 1 | w | h | `a.rs::there` `b.rs::gone` |\n\n| c |\n| --- |\n| z |\n\n\
                | # | killed | then | proved by |\n| --- | --- | --- | --- |\n| L1 | k | t | `c.rs::there` |\n";
    let found = rows(page);
    assert_eq!((found.len(), named_tests(found[0][3])), (2, vec![("a.rs", "there"), ("b.rs", "gone")]));
    assert_eq!(named_tests(found[1][3]), [("c.rs", "there")]);
    let source = "#[test]\nfn there() {}\nfn no_test() {}\nTest::new(\"area::in_the_lab\", run)";
    assert!(has_test(source, "there") && has_test(source, "in_the_lab"));
    assert!(!has_test(source, "no_test") && !has_test(source, "gone"));
}
