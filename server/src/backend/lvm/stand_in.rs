//! A thin pool in memory that does what LVM's tools are asked, for tests: what a killed server leaves of it can be looked at.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::command::{Call, PoolName};
use super::tool::{RunTools, TakeLine, ToolError, lock};

/// A logical volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Volume {
    /// Its size in bytes.
    pub(crate) bytes: u64,
    /// What is in it, in words.
    pub(crate) content: String,
    tag: String,
    /// Its number in the pool.
    pub(crate) thin_id: u32,
}

/// All of them, by name.
pub(crate) type Volumes = BTreeMap<String, Volume>;

/// Called before each change and after it, with what it is and what there is.
pub(crate) type AtChange = Box<dyn FnMut(&str, &Volumes) + Send>;

/// Called while the metadata are read.
pub(crate) type AtRead = Box<dyn FnMut(&mut Volumes) + Send>;

/// The pool.
#[derive(Clone)]
pub(crate) struct Pool {
    name: PoolName,
    volumes: Arc<Mutex<Volumes>>,
    at_change: Arc<Mutex<Option<AtChange>>>,
    at_read: Arc<Mutex<Option<AtRead>>>,
    /// What LVM says of its health, and whether all changes are refused.
    health: Arc<Mutex<(String, Option<String>)>>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("volumes", &self.volumes).finish_non_exhaustive()
    }
}

impl Pool {
    /// With these in it.
    pub(crate) fn new(name: PoolName, volumes: Volumes) -> Self {
        let volumes = Arc::new(Mutex::new(volumes));
        Self { name, volumes, at_change: Arc::default(), at_read: Arc::default(), health: Arc::default() }
    }

    /// Has it call this whenever its metadata are read.
    pub(crate) fn at_read(&self, at_read: impl FnMut(&mut Volumes) + Send + 'static) {
        *lock(&self.at_read) = Some(Box::new(at_read));
    }

    /// LVM says from now on that its health is this, and refuses all changes with these words.
    pub(crate) fn refuses(&self, health: &str, said: &str) {
        *lock(&self.health) = (health.to_owned(), Some(said.to_owned()));
    }

    /// One chunk for each volume, at the place of its number; all are read.
    fn read_metadata(&self, program: &str, args: &[String], take: &mut TakeLine) {
        let mut volumes = lock(&self.volumes);
        if let Some(at_read) = &mut *lock(&self.at_read) {
            at_read(&mut volumes);
        }
        if program == "thin_ls" {
            volumes.values().for_each(|volume| take(&format!("{} 65536", volume.thin_id)));
            return;
        }
        let thin_id = value(args, "--dev-id").expect("a number");
        take(r#"<superblock data_block_size="128">"#);
        take(&format!(r#"<device dev_id="{thin_id}" mapped_blocks="1">"#));
        take(&format!(r#"<single_mapping origin_block="0" data_block="{thin_id}" time="0"/>"#));
        take("</device>");
        take("</superblock>");
    }

    /// What is in it.
    pub(crate) fn volumes(&self) -> Volumes {
        lock(&self.volumes).clone()
    }

    /// Has it call this at each change.
    pub(crate) fn at_change(&self, at_change: impl FnMut(&str, &Volumes) + Send + 'static) {
        *lock(&self.at_change) = Some(Box::new(at_change));
    }

    /// Writes to a volume.
    pub(crate) fn write(&self, name: &str, content: &str) {
        lock(&self.volumes).get_mut(name).expect("it is there").content = content.to_owned();
    }

    fn change(
        &self,
        call: &Call,
        change: impl FnOnce(&mut Volumes) -> Result<(), String>,
    ) -> Result<(), ToolError> {
        let what = call.args.join(" ").replace(&call.args[2], "…");
        let look = |when: &str| {
            let volumes = self.volumes();
            if let Some(at_change) = &mut *lock(&self.at_change) {
                at_change(&format!("{when} {what}"), &volumes);
            }
        };
        look("before");
        if let Some(said) = lock(&self.health).1.clone() {
            return Err(ToolError::Failed { tool: call.name(), status: "exit status: 5".to_owned(), said });
        }
        change(&mut lock(&self.volumes)).map_err(|said| ToolError::Failed {
            tool: call.name(),
            status: "exit status: 5".to_owned(),
            said,
        })?;
        look("after");
        Ok(())
    }

    fn list(&self) -> String {
        let row = |(name, volume): (&String, &Volume)| {
            serde_json::json!({
                "lv_name": name, "lv_uuid": name, "vg_uuid": "vg", "lv_size": volume.bytes.to_string(),
                "pool_lv": self.name.pool, "lv_tags": volume.tag, "thin_id": volume.thin_id.to_string(),
                "data_percent": "0.00", "lv_kernel_major": "252", "lv_kernel_minor": volume.thin_id.to_string(),
            })
        };
        let rows: Vec<_> = lock(&self.volumes).iter().map(row).collect();
        serde_json::json!({ "report": [{ "lv": rows }] }).to_string()
    }

    fn state(&self) -> String {
        let row = serde_json::json!({
            "lv_name": self.name.pool, "lv_layout": "thin,pool", "lv_when_full": "error", "zero": "zero",
            "data_percent": "1.00", "metadata_percent": "1.00", "lv_health_status": lock(&self.health).0,
        });
        serde_json::json!({ "report": [{ "lv": [row] }] }).to_string()
    }
}

/// What follows an option.
fn value<'a>(args: &'a [String], option: &str) -> Option<&'a str> {
    let at = args.iter().position(|arg| arg == option)?;
    args.get(at + 1).map(String::as_str)
}

fn bytes(args: &[String], option: &str) -> u64 {
    value(args, option).and_then(|size| size.strip_suffix('b')).expect("a size").parse().expect("in bytes")
}

impl RunTools for Pool {
    fn run_lines(&self, call: &Call, mut take: TakeLine) -> Result<(), ToolError> {
        let args = &call.args;
        match call.program {
            "lvm" => {}
            "dmsetup" => return Ok(()),
            program => {
                self.read_metadata(program, args, &mut take);
                return Ok(());
            }
        }
        let last = args.last().expect("arguments").clone();
        let missing = |name: &str| format!("Failed to find logical volume \"{name}\"");
        let in_group = |name: &str| name.strip_prefix(&format!("{}/", self.name.group)).map(str::to_owned);
        match args[0].as_str() {
            "lvs" if last == self.name.group => take(&self.list()),
            "lvs" => take(&self.state()),
            "lvcreate" => {
                let name = value(args, "--name").expect("a name").to_owned();
                let tag = value(args, "--addtag").expect("a tag").to_owned();
                self.change(call, |volumes| {
                    let (bytes, content) = match args.iter().any(|arg| arg == "--snapshot") {
                        true => {
                            let of = in_group(&last).expect("of this group");
                            let of = volumes.get(&of).ok_or_else(|| missing(&last))?;
                            (of.bytes, of.content.clone())
                        }
                        false => (bytes(args, "--virtualsize"), "nothing".to_owned()),
                    };
                    let thin_id = volumes.values().map(|volume| volume.thin_id).max().unwrap_or(0) + 1;
                    match volumes.insert(name.clone(), Volume { bytes, content, tag, thin_id }) {
                        Some(_) => Err(format!("Logical Volume \"{name}\" already exists")),
                        None => Ok(()),
                    }
                })?;
            }
            "lvextend" => self.change(call, |volumes| {
                let name = in_group(&last).expect("of this group");
                let volume = volumes.get_mut(&name).ok_or_else(|| missing(&name))?;
                volume.bytes = bytes(args, "--size");
                Ok(())
            })?,
            "lvrename" => self.change(call, |volumes| {
                let from = &args[args.len() - 2];
                assert!(!volumes.contains_key(&last), "{last} is there");
                let volume = volumes.remove(from).ok_or_else(|| missing(from))?;
                volumes.insert(last.clone(), volume);
                Ok(())
            })?,
            "lvremove" => self.change(call, |volumes| {
                let name = in_group(&last).expect("of this group");
                volumes.remove(&name).map(drop).ok_or_else(|| missing(&name))
            })?,
            other => panic!("{other}"),
        }
        Ok(())
    }
}
