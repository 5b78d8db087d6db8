//! The way to what is adopted: below what `--adopt-allow` names, and through no symbolic link.
//!
//! Owns: [`resolve`], which gives a descriptor that can do nothing (`O_PATH`) but stand for the inode. Links are refused and not
//! followed, because whoever may change one could have any device served; the message says where it leads, so that whoever may manage
//! can name that instead.
//! Called by: `mod.rs`. Source: openat2(2), Linux 5.6.

use std::fs::File;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

use super::{AdoptError, Adoptable, is_below};
use crate::catalog::{SNAPSHOTS_DIR_NAME, VOLUMES_DIR_NAME};

/// No link decides, and nothing leads out.
const RESOLVE: ResolveFlags =
    ResolveFlags::NO_SYMLINKS.union(ResolveFlags::NO_MAGICLINKS).union(ResolveFlags::BENEATH);

/// The inode at the path.
///
/// # Errors
/// [`AdoptError`]: it may not be adopted, or is not there.
pub(super) fn resolve(adoptable: &Adoptable, path: &str) -> Result<File, AdoptError> {
    let plain = plain(path).ok_or_else(|| AdoptError::BadPath(path.to_owned()))?;
    let Some(root) = adoptable.allowed.iter().find(|root| plain.starts_with(root)) else {
        let allowed = adoptable.allowed.clone();
        return Err(AdoptError::NotAllowed { path: path.to_owned(), allowed });
    };
    // Volumes and snapshots may be on another file system, by a link.
    let own = ["", VOLUMES_DIR_NAME, SNAPSHOTS_DIR_NAME].map(|name| adoptable.data_dir.join(name));
    if own.iter().any(|dir| is_below(plain, dir)) {
        return Err(AdoptError::unsuitable(path, "is below the server's own data directory"));
    }
    let opened = open_below(Path::new("/"), root).and_then(|root_place| {
        match plain.strip_prefix(root) {
            Ok(rest) if !rest.as_os_str().is_empty() => below(&root_place, rest),
            // The root is what is to be adopted.
            _ => Ok(root_place),
        }
    });
    opened.map_err(|errno| match first_link(plain).filter(|_| errno == Errno::LOOP) {
        Some((link, target)) => {
            let instead = std::fs::canonicalize(plain).unwrap_or_default();
            let text = |path: &Path| path.display().to_string();
            AdoptError::Link { link: text(&link), target: text(&target), instead: text(&instead) }
        }
        None => AdoptError::io("open", path)(errno.into()),
    })
}

fn open_below(dir: &Path, path: &Path) -> Result<File, Errno> {
    let dir =
        rustix::fs::openat(CWD, dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let rest = path.strip_prefix("/").unwrap_or(path);
    below(&dir.into(), if rest.as_os_str().is_empty() { Path::new(".") } else { rest })
}

fn below(dir: &File, path: &Path) -> Result<File, Errno> {
    Ok(openat2(dir, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), RESOLVE)?.into())
}

/// The path as a list of names, if it is nothing else.
fn plain(path: &str) -> Option<&Path> {
    // As a path, empty parts and dots would not be seen.
    let names = path.strip_prefix('/')?;
    let is_name = |name: &str| !matches!(name, "" | "." | "..") && !name.contains('\0');
    names.split('/').all(is_name).then(|| Path::new(path))
}

/// The first symbolic link on the way, and what it says.
fn first_link(path: &Path) -> Option<(PathBuf, PathBuf)> {
    let mut at = PathBuf::new();
    for component in path.components() {
        at.push(component);
        if matches!(component, Component::Normal(_))
            && let Ok(target) = std::fs::read_link(&at)
        {
            return Some((at, target));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn adoptable(allowed: &Path) -> Adoptable {
        Adoptable { allowed: vec![allowed.to_owned()], ..Adoptable::default() }
    }

    #[test]
    fn only_what_is_named_and_below_it_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        // What is for temporary files may be behind a link.
        let dir = std::fs::canonicalize(dir.path()).unwrap();
        std::fs::create_dir(dir.join("in")).unwrap();
        std::fs::create_dir(dir.join("inside")).unwrap();
        for name in ["in/file", "inside/file", "file"] {
            std::fs::write(dir.join(name), "x").unwrap();
        }
        let resolve = |name: &str| {
            let path = format!("{}/{name}", dir.display());
            resolve(&adoptable(&dir.join("in")), &path).map(drop)
        };
        resolve("in/file").unwrap();
        for outside in ["file", "inside/file"] {
            assert!(matches!(resolve(outside), Err(AdoptError::NotAllowed { .. })), "{outside}");
        }
        for bad in ["in/../file", "in//file", "in/./file", "in/file/"] {
            assert!(matches!(resolve(bad), Err(AdoptError::BadPath(_))), "{bad}");
        }
        assert!(matches!(resolve("in/none"), Err(AdoptError::Io { .. })));
        let file = dir.join("file");
        super::resolve(&adoptable(&file), file.to_str().unwrap()).unwrap();
        let nothing = super::resolve(&Adoptable::default(), file.to_str().unwrap()).unwrap_err();
        assert!(nothing.to_string().contains("(nothing)"), "{nothing}");
    }

    #[test]
    fn a_link_on_the_way_is_told_with_what_to_say_instead() {
        let dir = tempfile::tempdir().unwrap();
        let dir = std::fs::canonicalize(dir.path()).unwrap();
        std::fs::create_dir(dir.join("real")).unwrap();
        std::fs::write(dir.join("real/file"), "x").unwrap();
        symlink("real", dir.join("way")).unwrap();
        symlink("file", dir.join("real/last")).unwrap();
        symlink("nowhere", dir.join("real/dangling")).unwrap();
        for (path, link, instead) in [
            ("way/file", "way", "real/file"),
            ("real/last", "real/last", "real/file"),
            ("real/dangling", "real/dangling", ""),
        ] {
            let error = resolve(&adoptable(&dir), dir.join(path).to_str().unwrap()).unwrap_err();
            let AdoptError::Link { link: found, instead: told, .. } = error else {
                panic!("{path}: {error}")
            };
            assert_eq!(found, dir.join(link).to_str().unwrap());
            assert_eq!(
                told,
                if instead.is_empty() { String::new() } else { dir.join(instead).display().to_string() }
            );
        }
        // Also where what is named is a link.
        let error =
            resolve(&adoptable(&dir.join("way")), dir.join("way/file").to_str().unwrap()).unwrap_err();
        assert!(matches!(error, AdoptError::Link { .. }), "{error}");
    }

    #[test]
    fn the_servers_own_files_are_not_adopted() {
        let dir = tempfile::tempdir().unwrap();
        let dir = std::fs::canonicalize(dir.path()).unwrap();
        std::fs::write(dir.join("file"), "x").unwrap();
        let own = Adoptable { data_dir: dir.clone(), ..adoptable(&dir) };
        let elsewhere = tempfile::tempdir().unwrap();
        let elsewhere = std::fs::canonicalize(elsewhere.path()).unwrap();
        for name in [VOLUMES_DIR_NAME, SNAPSHOTS_DIR_NAME] {
            std::fs::create_dir(elsewhere.join(name)).unwrap();
            std::fs::write(elsewhere.join(name).join("file"), "x").unwrap();
            symlink(elsewhere.join(name), dir.join(name)).unwrap();
        }
        let own = Adoptable { allowed: vec![dir.clone(), elsewhere.clone()], ..own };
        for dir in [dir, elsewhere.join(VOLUMES_DIR_NAME), elsewhere.join(SNAPSHOTS_DIR_NAME)] {
            let error = resolve(&own, dir.join("file").to_str().unwrap()).unwrap_err();
            assert!(error.to_string().contains("data directory"), "{error}");
        }
    }
}
