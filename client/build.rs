//! How the programs are linked.

fn main() {
    // Relocations in the packed form (DT_RELR): a device process's pages are locked, and the plain table of 0.7 MiB
    // is read whole at its start. glibc knows it since 2.36, binutils since 2.38.
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    println!("cargo::rerun-if-changed=build.rs");
}
