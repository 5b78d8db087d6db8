//! Compiles `volnode/v1/*.proto`, `csi/v1/csi.proto` and kubelet's `pluginregistration.proto` with protox (no system protoc), and
//! keeps the descriptors: for gRPC reflection, and for a test.

use std::path::{Path, PathBuf};

use prost::Message as _;
use prost_types::{DescriptorProto, FileDescriptorSet};

/// A field of this name is secret.
const SECRET: &str = "secrets";
/// All of this message is; it shows itself as nothing.
const PASSPHRASE: &str = ".volnode.v1.Passphrase";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let own = ["volnode/v1/management.proto", "volnode/v1/node.proto"];
    compile(&own, &out.join("volnode.v1.bin"), false)?;
    // A driver need not have all calls: the others answer UNIMPLEMENTED.
    compile(&["csi/v1/csi.proto"], &out.join("csi.v1.bin"), true)?;
    let registration = ["pluginregistration/v1/pluginregistration.proto"];
    compile(&registration, &out.join("pluginregistration.bin"), false)
}

fn compile(
    files: &[&str],
    descriptors_file: &Path,
    has_stubs: bool,
) -> Result<(), Box<dyn std::error::Error>> {
    for file in files {
        println!("cargo::rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["."])?;
    std::fs::write(descriptors_file, descriptors.encode_to_vec())?;
    // Nobody can print such a message, or one that it is in.
    let mut secret = secret_messages(&descriptors);
    secret.push(PASSPHRASE.to_owned());
    let builder = tonic_prost_build::configure().skip_debug(secret).generate_default_stubs(has_stubs);
    builder.compile_fds(descriptors)?;
    Ok(())
}

/// Messages with a secret field, as `.package.Message`.
fn secret_messages(descriptors: &FileDescriptorSet) -> Vec<String> {
    let has_secret = |message: &&DescriptorProto| message.field.iter().any(|field| field.name() == SECRET);
    let in_file = |file: &prost_types::FileDescriptorProto| {
        let package = file.package().to_owned();
        let names = file.message_type.iter().filter(has_secret);
        names.map(|message| format!(".{package}.{}", message.name())).collect::<Vec<_>>()
    };
    descriptors.file.iter().flat_map(in_file).collect()
}
