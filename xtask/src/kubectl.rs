//! Stock `kubectl` against the local cluster.

use std::{
    io::Write as _,
    path::Path,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::exec::{cmd, output};

/// The oldest `kubectl` that is promised to work, and the one that is named to those who have none.
const OLDEST: (u32, u32) = (1, 31);
const OFFERED: &str = "v1.32.4";

/// What puts the offered `kubectl` into `/usr/local/bin`, once its SHA-256 is that which its makers publish. `arch` is
/// Rust's word for it. As in <https://kubernetes.io/docs/tasks/tools/install-kubectl-linux/>.
pub(crate) fn install_line(arch: &str) -> String {
    let arch = match arch {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let url = format!("https://dl.k8s.io/release/{OFFERED}/bin/linux/{arch}/kubectl");
    format!(
        "curl -fLO {url} && echo \"$(curl -fL {url}.sha256)  kubectl\" | sha256sum --check \
         && sudo install -m 0755 kubectl /usr/local/bin/kubectl"
    )
}

/// What is wrong with a `kubectl` that answers this to `version --client -o json`.
pub(crate) fn version_problem(said: &str) -> Option<String> {
    let (major, minor) = OLDEST;
    let Some(version) = version(said) else {
        return Some("kubectl does not say its version".to_owned());
    };
    let is_old = version < OLDEST;
    let (of, at) = version;
    is_old.then(|| format!("kubectl is {of}.{at}, and {major}.{minor} or newer is needed"))
}

/// Major and minor version; some builds put a `+` behind.
fn version(said: &str) -> Option<(u32, u32)> {
    let said: Value = serde_json::from_str(said).ok()?;
    let number = |name: &str| {
        let text = said["clientVersion"][name].as_str()?;
        text.trim_end_matches(|last: char| !last.is_ascii_digit()).parse().ok()
    };
    Some((number("major")?, number("minor")?))
}

/// A `kubectl` that speaks to one cluster.
#[derive(Clone, Copy, Debug)]
pub struct Kubectl<'a> {
    pub(crate) kubeconfig: &'a Path,
}

impl<'a> Kubectl<'a> {
    /// For the cluster of that kubeconfig file.
    #[must_use]
    pub fn new(kubeconfig: &'a Path) -> Self {
        Self { kubeconfig }
    }

    fn command(self, args: &[&str]) -> std::process::Command {
        let mut command = cmd("kubectl", args);
        command.env("KUBECONFIG", self.kubeconfig);
        command
    }

    /// Runs it and returns what it printed.
    ///
    /// # Errors
    /// With its words when it fails.
    pub fn run(self, args: &[&str]) -> Result<String> {
        output(&mut self.command(args))
    }

    /// Runs it and returns its exit code and what it printed, whatever the code is.
    ///
    /// # Errors
    /// When it cannot be run or a signal ended it.
    pub fn said(self, args: &[&str]) -> Result<Said> {
        let mut command = self.command(args);
        let out = command.stdin(Stdio::null()).output().context("run kubectl")?;
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        let code = out.status.code().context("kubectl was ended by a signal")?;
        Ok(Said { code, stdout: text(&out.stdout), stderr: text(&out.stderr) })
    }

    /// `get … -o json`.
    ///
    /// # Errors
    /// When it fails or prints something else.
    pub fn json(self, args: &[&str]) -> Result<Value> {
        let text = self.run(&[args, &["-o", "json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("kubectl {}", args.join(" ")))
    }

    /// `apply -f -` of one object.
    ///
    /// # Errors
    /// With the server's words when it refuses the object.
    pub fn apply(self, object: &Value) -> Result<()> {
        let mut command = self.command(&["apply", "-f", "-"]);
        let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = pipes.spawn().context("run kubectl apply")?;
        let mut stdin = child.stdin.take().context("kubectl's stdin")?;
        stdin.write_all(object.to_string().as_bytes()).context("write to kubectl")?;
        drop(stdin);
        let out = child.wait_with_output().context("wait for kubectl apply")?;
        if !out.status.success() {
            bail!("kubectl apply: {}", String::from_utf8_lossy(&out.stderr));
        }
        Ok(())
    }

    /// Starts it with its stdout in a pipe; the caller ends it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(self, args: &[&str]) -> Result<Child> {
        let mut command = self.command(args);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        command.spawn().with_context(|| format!("run kubectl {}", args.join(" ")))
    }
}

/// What a call that may fail on purpose said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Asks again every 200 ms until the answer is `Some`.
///
/// # Errors
/// After `limit`, with `what` was waited for and the last failure of `ask`.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut ask: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let end = Instant::now() + limit;
    loop {
        let answer = ask();
        if let Ok(Some(found)) = answer {
            return Ok(found);
        }
        if Instant::now() > end {
            return match answer {
                Err(error) => {
                    Err(error.context(format!("waited {} s for {what}", limit.as_secs())))
                }
                Ok(_) => bail!("waited {} s for {what}", limit.as_secs()),
            };
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_below_the_oldest_are_told() {
        let problem = |minor: &str| {
            let version = serde_json::json!({ "major": "1", "minor": minor });
            version_problem(&serde_json::json!({ "clientVersion": version }).to_string())
        };
        for fine in ["31", "32+", "40"] {
            assert_eq!(problem(fine), None, "{fine}");
        }
        let told = "kubectl is 1.30, and 1.31 or newer is needed";
        assert_eq!(problem("30").as_deref(), Some(told));
        assert_eq!(problem("9+").as_deref(), Some("kubectl is 1.9, and 1.31 or newer is needed"));
        assert_eq!(version_problem("{}").as_deref(), Some("kubectl does not say its version"));
    }

    #[test]
    fn line_to_run_fetches_and_checks_for_this_architecture() {
        let line = install_line("aarch64");
        assert!(
            line.contains("https://dl.k8s.io/release/v1.32.4/bin/linux/arm64/kubectl "),
            "{line}"
        );
        assert!(line.contains("kubectl.sha256") && line.contains("sha256sum --check"), "{line}");
        assert!(install_line("x86_64").contains("/amd64/kubectl"));
    }
}
