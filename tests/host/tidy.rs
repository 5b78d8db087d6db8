//! The repository's own order: files that comments name are there, no file or folder leads back to itself, files stay
//! short.
//!
//! What is listed here as an exception may only get smaller.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Of a file that is no test, without its unit tests.
const LINES_MAX: usize = 600;

/// Longer ones, and how long they are.
const LONG_FILES: &[(&str, usize)] = &[
    ("proto/src/nbd/handshake/server.rs", 643),
    ("server/src/data/io/session_io.rs", 738),
    ("tests/src/simulator/world.rs", 663),
    ("tests/src/storage_node.rs", 706),
    ("ublk-core/src/abi.rs", 680),
];

/// Named in comments, and of others.
const FOREIGN_FILES: [&str; 2] = ["apt.conf", "doc/proto.md"];

struct Source {
    /// From the repository's root.
    path: PathBuf,
    /// Without unit tests.
    text: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// What the repository has in these folders and beside them.
const FOLDERS: [&str; 9] =
    [".cargo", ".ci", "client", "deploy", "docs", "proto", "server", "tests", "ublk-core"];

fn files() -> Vec<PathBuf> {
    let of_root = fs::read_dir(root()).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<PathBuf> = of_root
        .filter(|path| path.is_file())
        .map(|path| path.strip_prefix(root()).unwrap().to_owned())
        .collect();
    let mut folders: Vec<PathBuf> = FOLDERS.iter().map(|folder| root().join(folder)).collect();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_owned();
            if path.is_dir() && !path.is_symlink() && name != "target" {
                folders.push(path);
            } else if path.is_file() {
                found.push(path.strip_prefix(root()).unwrap().to_owned());
            }
        }
    }
    found
}

fn sources() -> Vec<Source> {
    let rust = files().into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    let source = |path: PathBuf| {
        let mut text = fs::read_to_string(root().join(&path)).unwrap();
        let unit_tests = text.match_indices("#[cfg(test)]\nmod ").find(|(at, found)| {
            let line = text[at + found.len()..].lines().next().unwrap_or_default();
            line.ends_with('{') && (*at == 0 || text[..*at].ends_with('\n'))
        });
        if let Some((at, _)) = unit_tests {
            text.truncate(at);
        }
        Source { path, text }
    };
    rust.map(source).collect()
}

/// The words between back quotes in a comment that are names of files.
fn named_files(line: &str) -> impl Iterator<Item = &str> {
    let comment = line.find("//").map_or("", |at| &line[at..]);
    comment.split('`').skip(1).step_by(2).filter(|word| {
        let extensions = [".rs", ".md", ".sh", ".py", ".proto", ".service", ".toml", ".rules", ".conf"];
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"_-./".contains(&byte);
        extensions.iter().any(|extension| word.ends_with(extension)) && word.bytes().all(is_name)
    })
}

#[test]
fn every_file_that_a_comment_names_is_there() {
    let files = files();
    let mut missing = Vec::new();
    for Source { path, .. } in sources() {
        let text = fs::read_to_string(root().join(&path)).unwrap();
        let crate_folder = path.components().next().unwrap();
        for (number, line) in text.lines().enumerate() {
            for name in named_files(line).filter(|name| !FOREIGN_FILES.contains(name)) {
                // A plain name is one of the same crate.
                let is_it = |file: &PathBuf| {
                    file.as_path() == Path::new(name)
                        || file.components().next() == Some(crate_folder) && file.ends_with(name)
                };
                if !files.iter().any(is_it) {
                    missing.push(format!("{}:{}: {name}", path.display(), number + 1));
                }
            }
        }
    }
    assert!(missing.is_empty(), "no such files (of another crate, give the path):\n{}", missing.join("\n"));
}

/// Whether a line begins a public function.
fn is_public_function(line: &str) -> bool {
    let words: Vec<&str> = line.split_whitespace().collect();
    let is_function = words.iter().take_while(|word| !word.contains('(')).any(|word| *word == "fn");
    words.first() == Some(&"pub") && is_function
}

#[test]
fn what_a_public_function_does_is_said_in_more_than_two_words() {
    let mut wrong = Vec::new();
    for Source { path, text } in sources().into_iter().filter(|source| !source.path.starts_with("tests")) {
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        for (at, line) in lines.iter().enumerate().filter(|(_, line)| is_public_function(line)) {
            let above = lines[..at].iter().rev();
            let above = above.take_while(|line| line.starts_with("#[") || line.starts_with("///"));
            let mut doc: Vec<&str> = above.filter_map(|line| line.strip_prefix("///")).collect();
            doc.reverse();
            let words = doc.iter().flat_map(|line| line.split_whitespace()).take_while(|word| *word != "#");
            if !doc.is_empty() && words.count() <= 2 {
                wrong.push(format!("{}:{}: {line}", path.display(), at + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn files_are_short_and_the_long_ones_grow_no_longer() {
    let mut wrong = Vec::new();
    for Source { path, text } in sources() {
        let is_test = path.components().nth(1).is_some_and(|folder| folder.as_os_str() == "tests");
        if is_test || path.starts_with("tests/vm") || path.starts_with("tests/host") {
            continue;
        }
        let lines = text.lines().count();
        let allowed = LONG_FILES.iter().find(|(long, _)| Path::new(long) == path).map(|(_, lines)| *lines);
        match allowed {
            None if lines > LINES_MAX => wrong.push(format!("{}: {lines} lines", path.display())),
            Some(_) if lines <= LINES_MAX => wrong.push(format!("{}: take it off the list", path.display())),
            Some(allowed) if lines > allowed => {
                wrong.push(format!("{}: {lines} lines, it had {allowed}", path.display()));
            }
            _ => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What a `use` statement names, each path by itself.
fn expand(statement: &str) -> Vec<String> {
    let Some(open) = statement.find('{') else {
        return vec![statement.split(" as ").next().unwrap_or_default().trim().to_owned()];
    };
    let (before, body) =
        (&statement[..open], &statement[open + 1..statement.rfind('}').unwrap_or(statement.len())]);
    let (mut depth, mut parts) = (0, vec![String::new()]);
    for letter in body.chars() {
        match letter {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(String::new());
                continue;
            }
            _ => {}
        }
        parts.last_mut().unwrap().push(letter);
    }
    let parts = parts.iter().map(|part| part.trim()).filter(|part| !part.is_empty());
    parts.flat_map(|part| expand(&format!("{before}{part}"))).collect()
}

/// By file of a crate, the files of the same crate that it uses.
fn uses_of(sources: &[Source], folder: &Path) -> BTreeMap<PathBuf, BTreeSet<PathBuf>> {
    let module_of = |path: &Path| -> Vec<String> {
        let inner = path.strip_prefix(folder).unwrap().with_extension("");
        let mut parts: Vec<String> = inner.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        if parts.last().is_some_and(|last| ["mod", "lib", "main"].contains(&last.as_str())) {
            parts.pop();
        }
        parts
    };
    let own = || sources.iter().filter(|source| source.path.starts_with(folder));
    let files: BTreeMap<Vec<String>, &PathBuf> = own()
        .map(|source| (module_of(&source.path), &source.path))
        .filter(|(module, _)| !module.is_empty())
        .collect();
    let mut uses = BTreeMap::new();
    for Source { path, text } in own() {
        let module = module_of(path);
        if module.is_empty() || module.last().is_some_and(|last| last == "tests") {
            continue;
        }
        let statements = text.split("\nuse ").skip(1).filter_map(|rest| rest.split(';').next());
        let mut used = BTreeSet::new();
        for name in statements.flat_map(expand) {
            let mut parts: Vec<String> = name.split("::").map(|part| part.trim().to_owned()).collect();
            let mut base = match parts[0].as_str() {
                "crate" => Vec::new(),
                "self" | "super" => module.clone(),
                _ => continue,
            };
            while parts.first().is_some_and(|first| ["crate", "self", "super"].contains(&first.as_str())) {
                if parts.remove(0) == "super" {
                    base.pop();
                }
            }
            base.extend(parts);
            // The longest beginning that is a file.
            let file = (1..=base.len()).rev().find_map(|length| files.get(&base[..length]));
            used.extend(file.filter(|file| **file != path).map(|file| (*file).clone()));
        }
        uses.insert(path.clone(), used);
    }
    uses
}

/// What can be reached from a file.
fn reached<'a>(uses: &'a BTreeMap<PathBuf, BTreeSet<PathBuf>>, from: &'a PathBuf) -> BTreeSet<&'a PathBuf> {
    let (mut reached, mut next) = (BTreeSet::new(), vec![from]);
    while let Some(file) = next.pop() {
        let used = uses.get(file).into_iter().flatten();
        next.extend(used.filter(|file| reached.insert(*file)));
    }
    reached
}

/// Of what lies beside each other in a folder, files and folders, what uses what.
fn uses_beside(uses: &BTreeMap<PathBuf, BTreeSet<PathBuf>>) -> BTreeMap<PathBuf, BTreeSet<PathBuf>> {
    let module = |file: &Path| match file.file_stem() {
        Some(stem) if ["mod", "lib", "main"].iter().any(|name| stem == *name) => {
            file.parent().unwrap().to_owned()
        }
        _ => file.with_extension(""),
    };
    let mut beside: BTreeMap<PathBuf, BTreeSet<PathBuf>> = BTreeMap::new();
    for (file, used) in uses.iter().flat_map(|(file, used)| used.iter().map(move |used| (file, used))) {
        let (file, used) = (module(file), module(used));
        let common: PathBuf = file
            .iter()
            .zip(used.iter())
            .take_while(|(one, other)| one == other)
            .map(|(one, _)| one)
            .collect();
        let child = |module: &Path| module.iter().nth(common.iter().count()).map(|name| common.join(name));
        // A folder's own file is not beside what is in it.
        if let (Some(file), Some(used)) = (child(&file), child(&used)) {
            beside.entry(file).or_default().insert(used);
        }
    }
    beside
}

/// What leads back to itself.
fn circles(uses: &BTreeMap<PathBuf, BTreeSet<PathBuf>>) -> BTreeSet<Vec<&PathBuf>> {
    let mut circles = BTreeSet::new();
    for path in uses.keys() {
        let there = reached(uses, path);
        if there.contains(path) {
            circles.insert(there.into_iter().filter(|other| reached(uses, other).contains(path)).collect());
        }
    }
    circles
}

#[test]
fn no_file_and_no_folder_leads_back_to_itself() {
    let sources = sources();
    let mut folders = BTreeSet::new();
    for folder in ["client/src", "proto/src", "proto/tls/src", "server/src", "tests/src", "ublk-core/src"] {
        let uses = uses_of(&sources, Path::new(folder));
        assert!(uses.values().any(|used| !used.is_empty()), "{folder}: nothing was read");
        assert_eq!(circles(&uses), BTreeSet::<Vec<&PathBuf>>::new(), "{folder}: files");
        let uses = uses_beside(&uses);
        folders.extend(circles(&uses).into_iter().flatten().map(|path| path.display().to_string()));
    }
    assert_eq!(folders, BTreeSet::<String>::new(), "folders and files beside each other");
}

#[test]
fn folders_that_use_each_other_are_a_circle_even_if_their_files_are_none() {
    let uses = |pairs: &[(&str, &str)]| -> BTreeMap<PathBuf, BTreeSet<PathBuf>> {
        pairs
            .iter()
            .map(|(file, used)| (PathBuf::from(file), BTreeSet::from([PathBuf::from(used)])))
            .collect()
    };
    let both_ways = uses(&[("c/src/a/x.rs", "c/src/b/y.rs"), ("c/src/b/z.rs", "c/src/a/mod.rs")]);
    assert_eq!(circles(&both_ways), BTreeSet::new());
    let (a, b) = (PathBuf::from("c/src/a"), PathBuf::from("c/src/b"));
    assert_eq!(circles(&uses_beside(&both_ways)), BTreeSet::from([vec![&a, &b]]));
    let parent_and_child = uses(&[("c/src/a/mod.rs", "c/src/a/x.rs"), ("c/src/a/x.rs", "c/src/a/mod.rs")]);
    assert_eq!(uses_beside(&parent_and_child), BTreeMap::new());
}

#[test]
fn names_of_files_and_of_what_is_used_are_read() {
    // Names that are there: this file is read as well.
    let line = "use x; // `tidy.rs` and `docs/tls.md`, not `d`, `x y.rs` or e.rs";
    assert_eq!(named_files(line).collect::<Vec<_>>(), ["tidy.rs", "docs/tls.md"]);
    assert_eq!(
        expand("crate::a::{self, b::{C, D as E}, F}"),
        ["crate::a::self", "crate::a::b::C", "crate::a::b::D", "crate::a::F"]
    );
}
