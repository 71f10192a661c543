//! Two Syncthings with one folder, in a network of their own that has nothing but loopback:
//! discovery, relays, port mapping, usage and crash reports and upgrades are off besides.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use crate::peers::text;

pub const NAME: &str = "Syncthing (Debian)";

const PORTS: [u16; 2] = [22_001, 22_002];

/// A giver whose folder is full and a taker whose folder is empty at the start of each run.
#[derive(Clone)]
pub struct Pair {
    homes: [PathBuf; 2],
    folders: [PathBuf; 2],
}

fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(text)?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        let why = String::from_utf8_lossy(&output.stderr);
        Err(format!("{command:?}: {}", why.trim()))
    }
}

fn syncthing(home: &Path) -> Command {
    let mut command = Command::new("syncthing");
    command.env("HOME", home).env("STNOUPGRADE", "1");
    command
}

impl Pair {
    pub fn new(dir: &Path, files: &Path) -> Result<Self, String> {
        if Command::new("syncthing").arg("--version").output().is_err() {
            return Err(
                "there is no program `syncthing` here: apt-get install syncthing".to_owned(),
            );
        }
        // Whether there may be a network without a way out is asked before anything is started.
        run(Command::new("unshare").args(["--net", "ip", "link", "set", "lo", "up"]))
            .map_err(|why| format!("it is only run in a network of its own: {why}"))?;
        let pair = Self {
            homes: ["giver", "taker"].map(|name| dir.join(name)),
            folders: [files.to_owned(), dir.join("taken")],
        };
        let mut ids = Vec::new();
        for home in &pair.homes {
            fs::create_dir_all(home).map_err(text)?;
            let mut generate = Command::new("unshare");
            generate.args(["--net", "syncthing", "generate", "--no-default-folder"]);
            generate.args(["--skip-port-probing", "--home"]).arg(home);
            run(generate.env("HOME", home))?;
            ids.push(run(syncthing(home)
                .arg("--device-id")
                .arg("--home")
                .arg(home))?);
        }
        for (home, folder) in pair.homes.iter().zip(&pair.folders) {
            let own = usize::from(home == &pair.homes[1]);
            fs::write(home.join("config.xml"), config(&ids, own, folder)).map_err(text)?;
        }
        Ok(pair)
    }

    /// Seconds from the connection until the taker has so many files.
    pub fn run(&self, slice: usize, files: usize, within: Duration) -> Result<f64, String> {
        let [_, taken] = &self.folders;
        for folder in &self.folders {
            fs::create_dir_all(folder.join(".stfolder")).map_err(text)?;
        }
        let index = fs::read_dir(&self.homes[1]).map_err(text)?.flatten();
        for entry in index.filter(|e| e.file_name().to_string_lossy().starts_with("index")) {
            fs::remove_dir_all(entry.path()).map_err(text)?;
        }
        let mut giver = Command::new("unshare");
        giver.args([
            "--net",
            "sh",
            "-c",
            "ip link set lo up && exec \"$@\"",
            "sh",
        ]);
        let giver = Running::start(giver, &self.homes[0])?;
        giver.heard("Completed initial scan", within)?;
        let mut taker = Command::new("nsenter");
        taker.arg(format!("--net=/proc/{}/ns/net", giver.child.id()));
        let taker = Running::start(taker, &self.homes[1])?;
        let begun = taker.heard("Established secure connection", within)?;
        let complete = || {
            let entries = fs::read_dir(taken).map_err(text)?.flatten();
            let whole = entries.filter(|e| !e.file_name().to_string_lossy().starts_with('.'));
            Ok::<_, String>(whole.count() >= files)
        };
        while !complete()? {
            if begun.elapsed() > within {
                return Err(format!(
                    "run {slice}: not all files after {} s",
                    within.as_secs()
                ));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let seconds = begun.elapsed().as_secs_f64();
        drop((taker, giver));
        fs::remove_dir_all(taken).map_err(text)?;
        Ok(seconds)
    }
}

fn config(ids: &[String], own: usize, folder: &Path) -> String {
    let devices: String = ids
        .iter()
        .zip(PORTS)
        .map(|(id, port)| {
            format!("<device id=\"{id}\" compression=\"never\"><address>tcp://127.0.0.1:{port}</address></device>")
        })
        .collect();
    let members: String = ids
        .iter()
        .map(|id| format!("<device id=\"{id}\"></device>"))
        .collect();
    format!(
        "<configuration version=\"36\">{devices}\
         <folder id=\"bench\" path=\"{}\" type=\"sendreceive\" rescanIntervalS=\"3600\" fsWatcherEnabled=\"false\">\
         {members}<minDiskFree unit=\"%\">0</minDiskFree></folder>\
         <gui enabled=\"false\"></gui><options>\
         <listenAddress>tcp://127.0.0.1:{}</listenAddress>\
         <globalAnnounceEnabled>false</globalAnnounceEnabled><localAnnounceEnabled>false</localAnnounceEnabled>\
         <relaysEnabled>false</relaysEnabled><natEnabled>false</natEnabled><stunKeepaliveStartS>0</stunKeepaliveStartS>\
         <urAccepted>-1</urAccepted><autoUpgradeIntervalH>0</autoUpgradeIntervalH>\
         <crashReportingEnabled>false</crashReportingEnabled><startBrowser>false</startBrowser>\
         <announceLANAddresses>false</announceLANAddresses><setLowPriority>false</setLowPriority>\
         <reconnectionIntervalS>5</reconnectionIntervalS></options></configuration>",
        folder.display(),
        PORTS[own],
    )
}

/// A Syncthing with its overseer, in a group of processes that ends as one.
struct Running {
    child: Child,
    lines: mpsc::Receiver<(Instant, String)>,
}

impl Running {
    /// `inside` is a program that runs what follows its arguments.
    fn start(mut inside: Command, home: &Path) -> Result<Self, String> {
        inside
            .args([
                "syncthing",
                "serve",
                "--no-browser",
                "--no-restart",
                "--no-upgrade",
                "--home",
            ])
            .arg(home)
            .env("HOME", home)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = inside.spawn().map_err(text)?;
        let stdout = child.stdout.take().ok_or("no standard output")?;
        let (said, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = said.send((Instant::now(), line));
            }
        });
        Ok(Self { child, lines })
    }

    /// When it said so.
    fn heard(&self, what: &str, within: Duration) -> Result<Instant, String> {
        let until = Instant::now() + within;
        let mut last = String::new();
        while let Ok((at, line)) = self
            .lines
            .recv_timeout(until.saturating_duration_since(Instant::now()))
        {
            if line.contains(what) {
                return Ok(at);
            }
            last = line;
        }
        Err(format!(
            "Syncthing did not say `{what}`; its last words: {last}"
        ))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let group = i32::try_from(self.child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        if let Some(group) = group {
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
        let _ = self.child.wait();
    }
}
