//! The Container Storage Interface, version 1.13, and kubelet's plugin registration, generated from `csi/v1/csi.proto` and
//! `pluginregistration.proto`.
//!
//! Invariant: what travels is what the specification says. `csi/v1/schema.txt` has its names and numbers, and a test compares.
//! Messages with secrets have no Debug.

/// `csi.v1`: the services Identity, Controller, GroupController, SnapshotMetadata and Node.
pub mod v1 {
    #![allow(missing_docs, unreachable_pub, clippy::all, clippy::too_many_lines)]
    tonic::include_proto!("csi.v1");

    /// The compiled descriptors (`google.protobuf.FileDescriptorSet`).
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/csi.v1.bin"));
}

/// `pluginregistration`: how kubelet gets to know a plugin.
pub mod registration {
    #![allow(missing_docs, unreachable_pub, clippy::all, clippy::too_many_lines)]
    tonic::include_proto!("pluginregistration");

    /// The compiled descriptors (`google.protobuf.FileDescriptorSet`).
    pub const FILE_DESCRIPTOR_SET: &[u8] =
        include_bytes!(concat!(env!("OUT_DIR"), "/pluginregistration.bin"));
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::Message as _;
    use prost_types::field_descriptor_proto::{Label, Type};
    use prost_types::{
        DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet,
    };

    use super::{registration, v1};

    const CSI_SCHEMA: &str = include_str!("../csi/v1/schema.txt");
    /// Of kubelet's interface.
    const REGISTRATION_SCHEMA: &str = "
message InfoRequest
message PluginInfo
field PluginInfo.type 1 string
field PluginInfo.name 2 string
field PluginInfo.endpoint 3 string
field PluginInfo.supported_versions 4 repeated string
message RegistrationStatus
field RegistrationStatus.plugin_registered 1 bool
field RegistrationStatus.error 2 string
message RegistrationStatusResponse
rpc Registration.GetInfo InfoRequest PluginInfo
rpc Registration.NotifyRegistrationStatus RegistrationStatus RegistrationStatusResponse
";

    fn lines(schema: &str) -> BTreeSet<String> {
        let lines = schema.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        lines.map(str::to_owned).collect()
    }

    fn file(descriptors: &[u8], package: &str) -> FileDescriptorProto {
        let set = FileDescriptorSet::decode(descriptors).unwrap();
        set.file.into_iter().find(|file| file.package() == package).unwrap()
    }

    /// A type's name without the package.
    fn short(name: &str, package: &str) -> String {
        let own = name.strip_prefix(&format!(".{package}."));
        own.unwrap_or(name.trim_start_matches('.')).to_owned()
    }

    fn type_of(field: &FieldDescriptorProto, of: &DescriptorProto, package: &str) -> String {
        let is_entry =
            |nested: &&DescriptorProto| field.type_name().ends_with(&format!(".{}", nested.name()));
        let entry = of.nested_type.iter().find(is_entry);
        if let Some(entry) =
            entry.filter(|entry| entry.options.as_ref().is_some_and(|options| options.map_entry()))
        {
            let types: Vec<String> = entry.field.iter().map(|field| type_of(field, entry, package)).collect();
            return format!("map<{}>", types.join(","));
        }
        let name = match field.r#type() {
            Type::String => "string".to_owned(),
            Type::Bool => "bool".to_owned(),
            Type::Int32 => "int32".to_owned(),
            Type::Int64 => "int64".to_owned(),
            Type::Message | Type::Enum => short(field.type_name(), package),
            other => format!("{other:?}"),
        };
        let repeated = if field.label() == Label::Repeated { "repeated " } else { "" };
        format!("{repeated}{name}")
    }

    fn add_enum(found: &mut BTreeSet<String>, within: &str, of: &EnumDescriptorProto) {
        let name = format!("{within}{}", of.name());
        for value in &of.value {
            found.insert(format!("value {name} {} {}", value.name(), value.number()));
        }
        for range in &of.reserved_range {
            found.extend((range.start()..=range.end()).map(|number| format!("reserved {name} {number}")));
        }
    }

    fn add_message(found: &mut BTreeSet<String>, within: &str, of: &DescriptorProto, package: &str) {
        let name = format!("{within}{}", of.name());
        found.insert(format!("message {name}"));
        for field in &of.field {
            let one_of =
                field.oneof_index.map(|index| format!(" oneof {}", of.oneof_decl[index as usize].name()));
            let type_name = type_of(field, of, package);
            let one_of = one_of.unwrap_or_default();
            found.insert(format!("field {name}.{} {} {type_name}{one_of}", field.name(), field.number()));
        }
        for range in &of.reserved_range {
            found.extend((range.start()..range.end()).map(|number| format!("reserved {name} {number}")));
        }
        let within = format!("{name}.");
        of.enum_type.iter().for_each(|of| add_enum(found, &within, of));
        let is_entry =
            |nested: &&DescriptorProto| nested.options.as_ref().is_some_and(|options| options.map_entry());
        for nested in of.nested_type.iter().filter(|nested| !is_entry(nested)) {
            add_message(found, &within, nested, package);
        }
    }

    /// What a compiled file has, in the fixture's words.
    fn found(file: &FileDescriptorProto) -> BTreeSet<String> {
        let (mut found, package) = (BTreeSet::new(), file.package());
        file.enum_type.iter().for_each(|of| add_enum(&mut found, "", of));
        file.message_type.iter().for_each(|of| add_message(&mut found, "", of, package));
        for service in &file.service {
            for method in &service.method {
                let stream = if method.server_streaming() { "stream " } else { "" };
                found.insert(format!(
                    "rpc {}.{} {} {stream}{}",
                    service.name(),
                    method.name(),
                    short(method.input_type(), package),
                    short(method.output_type(), package)
                ));
            }
        }
        found
    }

    fn assert_same(found: &BTreeSet<String>, expected: &BTreeSet<String>) {
        let missing: Vec<_> = expected.difference(found).collect();
        let too_many: Vec<_> = found.difference(expected).collect();
        assert!(missing.is_empty() && too_many.is_empty(), "missing: {missing:#?}\nnot there: {too_many:#?}");
    }

    #[test]
    fn names_and_numbers_are_those_of_the_specification() {
        let expected = lines(CSI_SCHEMA);
        assert!(expected.len() > 400, "{}", expected.len());
        assert_same(&found(&file(v1::FILE_DESCRIPTOR_SET, "csi.v1")), &expected);
    }

    #[test]
    fn kubelet_finds_its_registration_as_it_knows_it() {
        let registration = file(registration::FILE_DESCRIPTOR_SET, "pluginregistration");
        assert_same(&found(&registration), &lines(REGISTRATION_SCHEMA));
    }

    /// Says whether a type has Debug: the inherent function wins where it exists.
    struct HasDebug<T>(std::marker::PhantomData<T>);

    trait WithoutDebug {
        fn has_debug(&self) -> bool {
            false
        }
    }

    impl<T> WithoutDebug for HasDebug<T> {}

    impl<T: std::fmt::Debug> HasDebug<T> {
        fn has_debug(&self) -> bool {
            true
        }
    }

    #[test]
    fn what_carries_secrets_cannot_be_printed() {
        use std::marker::PhantomData;
        assert!(HasDebug::<v1::ProbeRequest>(PhantomData).has_debug(), "the check itself");
        assert!(!HasDebug::<v1::CreateVolumeRequest>(PhantomData).has_debug());
        assert!(!HasDebug::<v1::NodeStageVolumeRequest>(PhantomData).has_debug());
        assert!(!HasDebug::<v1::NodePublishVolumeRequest>(PhantomData).has_debug());
        assert!(!HasDebug::<v1::NodeExpandVolumeRequest>(PhantomData).has_debug());
        assert!(!HasDebug::<v1::ControllerPublishVolumeRequest>(PhantomData).has_debug());
    }
}
