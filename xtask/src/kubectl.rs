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
