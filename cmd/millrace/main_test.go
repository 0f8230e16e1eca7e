package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/need"
)

// The test binary is the product when this is set, so that the tests run real
// processes and so do the lab and the benchmarks.
const asProduct = "MILLRACE_TEST_AS_PRODUCT"

func TestMain(m *testing.M) {
	if of := os.Getenv(asCrowd); of != "" {
		if err := beCrowd(of); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if os.Getenv(asProduct) != "" {
		main()
		return
	}
	os.Setenv(asProduct, "1")
	os.Exit(m.Run())
}

// millrace runs the product and returns what it printed and its exit status.
func millrace(t *testing.T, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	return finish(t, product(args...))
}

func product(args ...string) *exec.Cmd { return exec.Command(os.Args[0], args...) }

func finish(t *testing.T, c *exec.Cmd) (stdout, stderr string, status int) {
	t.Helper()
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	err := c.Run()
	if _, exited := err.(*exec.ExitError); err != nil && !exited {
		t.Fatal(err)
	}
	return out.String(), errs.String(), c.ProcessState.ExitCode()
}

func needsRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes namespaces and loads programs")
	}
}

// Every help starts with what the command does to this host, and lists the exit
// statuses. All flags together are few.
func TestHelpOfEveryCommand(t *testing.T) {
	flags := map[string]bool{}
	var visit func(*cobra.Command)
	visit = func(c *cobra.Command) {
		first, _, _ := strings.Cut(c.Long, "\n")
		if first != readsOnly && first != changesHost && first != replacesOther && first != tunesHost && first != undoesTune && first != scalesServers && first != makesPods && first != inOwnSpaces {
			t.Errorf("%s: the help starts with %q, which is none of the effects", c.CommandPath(), first)
		}
		if !c.HasSubCommands() && !strings.Contains(c.Long, "Exit statuses:\n  0   done") {
			t.Errorf("%s: the help lists no exit statuses", c.CommandPath())
		}
		if c.Short == "" {
			t.Errorf("%s has no short help", c.CommandPath())
		}
		if (first == changesHost || first == replacesOther || first == tunesHost || first == undoesTune || first == scalesServers || first == makesPods) && !c.HasSubCommands() && c.Flags().Lookup("dry-run") == nil {
			t.Errorf("%s changes the host and has no --dry-run", c.CommandPath())
		}
		c.Flags().VisitAll(func(f *pflag.Flag) { flags[f.Name] = true })
		for _, sub := range c.Commands() {
			visit(sub)
		}
	}
	visit(rootCommand())
	t.Logf("%d flags in all", len(flags))
	// Four of them are of tune: a profile, what runs already, all of it, and whether to
	// measure for a minute before something is set are a person's to say.
	// And --dns: the cluster's domain is in no object of the API, and whether to stand
	// in front of its DNS servers is the user's choice.
	if len(flags) >= 45 {
		t.Errorf("%d flags; we want fewer than 45 in all", len(flags))
	}
}

func TestExitStatuses(t *testing.T) {
	broken := filepath.Join(t.TempDir(), "broken.yaml")
	write(t, broken, "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  ports: [{port: 0}]\n")
	for _, row := range []struct {
		args   []string
		status int
		says   string
	}{
		{[]string{"version"}, exitOK, ""},
		{[]string{"nonsense"}, exitUsage, `unknown command "nonsense"`},
		{[]string{"version", "--nonsense"}, exitUsage, "unknown flag: --nonsense"},
		{[]string{"version", "-o", "xml"}, exitUsage, `--output "xml": use text or json`},
		{[]string{"version", "argument"}, exitUsage, "unknown command"},
		{[]string{"agent"}, exitUsage, "--source is missing: say --source dir:PATH"},
		{[]string{"agent", "--source", "nfs:x"}, exitUsage, `--source "nfs:x": use dir:PATH, kube:PATH or kube:`},
		{[]string{"plan", "--source", "kube:"}, exitData, "read service account: stat /var/run/secrets/kubernetes.io/serviceaccount/token"},
		{[]string{"plan", "--source", "kube:/absent"}, exitData, "/absent: no such file or directory"},
		{[]string{"plan", "--source", "kube:/absent", "--api-server", "ftp://x"}, exitData, "/absent: no such file or directory"},
		{[]string{"plan", "--source", "dir:" + broken, "--api-server", "https://x"}, exitUsage, "--api-server goes with --source kube: only"},
		{[]string{"plan", "--source", "dir:/absent"}, exitData, "/absent: no such file or directory"},
		{[]string{"plan", "--source", "dir:" + broken, "--pins", "/absent"}, exitData, "spec.ports[0].port"},
		{[]string{"status", "--run", "/absent"}, exitFailed, "is an agent running?"},
		{[]string{"show"}, exitUsage, "services, backends, names, queries, pods, routes, settings, flows or drops"},
		{[]string{"lab", "status", "--name", "absent"}, exitFailed, `no lab "absent" is up`},
		{[]string{"lab", "up"}, exitUsage, "-f is missing"},
		{[]string{"lab", "up", "-f", broken, "--name", "Bad_Name"}, exitUsage, "bad lab name"},
		{[]string{"lab", "up", "-f", broken, "--nodes", "500"}, exitUsage, "--nodes 500: use 1 to 200"},
		{[]string{"bench", "services", "--variants", "foo"}, exitUsage, "foo"},
		{[]string{"bench", "services", "--services", "0"}, exitUsage, "0 Services: use 1 to"},
		{[]string{"kube-proxy"}, exitUsage, "say what to do: remove"},
		{[]string{"lab", "exec", "pod"}, exitUsage, "say POD -- COMMAND"},
	} {
		stdout, stderr, status := millrace(t, row.args...)
		if status != row.status || !strings.Contains(stderr, row.says) {
			t.Errorf("millrace %s: exit status %d, not %d; says %q, not %q; printed %q",
				strings.Join(row.args, " "), status, row.status, stderr, row.says, stdout)
		}
	}
}

// What is missing ends with a status of its own.
func TestWhatIsMissingHasItsOwnStatus(t *testing.T) {
	if s := statusOf(&ran{fmt.Errorf("load: %w", &need.Feature{Act: "a", Feature: "b", Since: "c"})}); s != exitUnavailable {
		t.Errorf("a missing kernel feature ends with %d, not %d", s, exitUnavailable)
	}
	needsRoot(t)
	folder := t.TempDir()
	write(t, filepath.Join(folder, "empty.yaml"), "")
	t.Run("no capability", func(t *testing.T) {
		c := product("agent", "--source", "dir:"+folder, "--cgroup", t.TempDir(), "--pins", "/absent", "--run", filepath.Join(t.TempDir(), "run"))
		_, stderr, status := finish(t, weak(c))
		if status != exitPrivilege || !strings.Contains(stderr, "CAP_NET_ADMIN") {
			t.Errorf("exit status %d, not %d; says %q", status, exitPrivilege, stderr)
		}
	})
	t.Run("no cgroup2", func(t *testing.T) {
		// A mount namespace of its own, in which every cgroup2 is unmounted.
		script := `for m in $(awk '$3 == "cgroup2" {print $2}' /proc/mounts); do umount -l "$m" || exit 9; done; exec "$@"`
		c := exec.Command("sh", append([]string{"-c", script, "sh", os.Args[0]}, "agent", "--source", "dir:"+folder, "--run", filepath.Join(t.TempDir(), "run"))...)
		c.SysProcAttr = &unix.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
		_, stderr, status := finish(t, c)
		if status != exitUnavailable || !strings.Contains(stderr, "no cgroup2 hierarchy is mounted") {
			t.Errorf("exit status %d, not %d; says %q", status, exitUnavailable, stderr)
		}
	})
}

// weak makes a command run as root without any capability.
func weak(c *exec.Cmd) *exec.Cmd {
	return exec.Command("setpriv", append([]string{"--bounding-set=-all", "--inh-caps=-all", "--"}, c.Args...)...)
}

func TestVersionForMachines(t *testing.T) {
	stdout, _, _ := millrace(t, "version", "-o", "json")
	var v map[string]string
	if err := json.Unmarshal([]byte(stdout), &v); err != nil || v["version"] != version || v["kernel"] == "" {
		t.Errorf("%q: %v", stdout, err)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}
