package main

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/millrace/millrace/bench"
	"github.com/millrace/millrace/kernel/sysctl"
	"github.com/millrace/millrace/layer/tune/knob"
)

const (
	datagrams   = "net.core.rmem_default"
	mostMemory  = "net.core.rmem_max"
	mostSent    = "net.core.wmem_max"
	trackedMost = "net.netfilter.nf_conntrack_max"
)

// machineOf is a folder that stands for /proc/sys, with settings.
func (w *workshop) machineOf(values map[string]string) (root string, read func(name string) string) {
	w.t.Helper()
	root = w.t.TempDir()
	for name, value := range values {
		file := filepath.Join(root, strings.ReplaceAll(name, ".", "/"))
		w.must(os.MkdirAll(filepath.Dir(file), 0o755))
		write(w.t, file, value+"\n")
	}
	return root, func(name string) string {
		w.t.Helper()
		value, err := sysctl.Tree{Root: root}.Read(name)
		w.must(err)
		return value
	}
}

// article is a profile that somebody else wrote.
func (w *workshop) article(lines ...string) string {
	w.t.Helper()
	file := filepath.Join(w.t.TempDir(), "article.conf")
	write(w.t, file, strings.Join(lines, "\n")+"\n")
	return file
}

// Three settings that help are set, with the figures; what an article says besides is
// left, each for its reason; all of it goes back.
func TestTuneApplyProves(t *testing.T) {
	w := newWorkshop(t)
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip(err)
	}
	values := map[string]string{somaxconn: "128", datagrams: "212992", trackedMost: w.value(w.node, trackedMost), "net.core.busy_read": "0"}
	n, err := strconv.Atoi(values[trackedMost])
	w.must(err)
	limit := strconv.Itoa(2 * n)
	root, read := w.machineOf(values)
	file := w.article("# ten settings that make your node fly", "; by somebody", somaxconn+" = 4096", datagrams+"=1048576", "-net/netfilter/nf_conntrack_max = "+limit,
		"net.ipv4.tcp_tw_reuse = 1", "net.core.busy_read = 50", "kernel.pid_max = 1")
	w.wants(exitUsage, "say --prove, and those that help here are set", "apply", "--profile", file, "--proc-sys", root)
	stdout, stderr, status := w.tune("apply", "--profile", file, "--prove", "--rounds", "9", "--proc-sys", root, "-o", "json")
	var all struct {
		Changes []struct{ Op, Object, Detail string }
		Refused []string
		Proofs  []tried
	}
	if err := json.Unmarshal([]byte(stdout), &all); err != nil || status != exitIncomplete || len(all.Proofs) != 3 || len(all.Changes) != 3 || len(all.Refused) != 2 {
		t.Fatalf("exit status %d: %s\n%s: %v", status, stdout, stderr, err)
	}
	for _, one := range all.Proofs {
		t.Log(one.Proof)
		if one.Outcome != helps || one.Ratio.Low == nil || *one.Ratio.Low < 1.5 {
			t.Errorf("%s: %+v", one.Outcome, one.Proof)
		}
	}
	for _, want := range []string{"net.core.busy_read of node: no load here shows what it does: `millrace tune apply busy-polling` without --prove", `nothing that can be tuned is called "kernel.pid_max"`} {
		if !strings.Contains(stderr, want) {
			t.Errorf("it says %q, not %q", stderr, want)
		}
	}
	if read(somaxconn) != "4096" || read(datagrams) != "1048576" || read(trackedMost) != limit || read("net.core.busy_read") != "0" {
		t.Errorf("they are %s, %s, %s, %s", read(somaxconn), read(datagrams), read(trackedMost), read("net.core.busy_read"))
	}
	w.wants(exitOK, "- "+somaxconn+" 4096 -> 128", "undo", "--all", "--proc-sys", root)
	for name, value := range values {
		if read(name) != value {
			t.Errorf("%s is %s after undo, and was %s", name, read(name), value)
		}
	}
}

// A profile with one value that harms is refused as a whole, and one that does nothing is
// kept out: nothing is written, not even what helps, and nothing is written down.
func TestTuneApplyRejectsAHarmfulProfile(t *testing.T) {
	w := newWorkshop(t)
	root, read := w.machineOf(map[string]string{somaxconn: "4096", datagrams: "212992", "net.core.wmem_default": "212992"})
	harmful := w.article(somaxconn+" = 16", datagrams+" = 1048576")
	for _, more := range [][]string{nil, {"--dry-run"}, {"-o", "json"}} {
		printed := w.wants(exitFindings, "nothing was set: harmful: net.core.somaxconn 4096 -> 16: ", append([]string{"apply", "--profile", harmful, "--prove", "--rounds", "6", "--proc-sys", root}, more...)...)
		if len(more) < 2 && (!strings.Contains(printed, "    refused: 0.0") || !strings.Contains(printed, "    set: 4.9")) {
			t.Errorf("the comparison is %q", printed)
		}
	}
	idle := w.article(datagrams+" = 212993", "net.core.wmem_default = 1000000")
	printed := w.wants(exitOK, "nothing to change", "apply", "--profile", idle, "--prove", "--rounds", "6", "--proc-sys", root)
	for _, want := range []string{"no effect: net.core.rmem_default 212992 -> 212993", "    kept as it was: 1.000 [1.000, 1.000]\n", "net.core.wmem_default is left alone: a UDP sender waits for its device"} {
		if !strings.Contains(printed, want) {
			t.Errorf("it prints %q, not %q", printed, want)
		}
	}
	w.wants(exitUsage, "use 6 to 10,000", "apply", "--profile", idle, "--prove", "--rounds", "5", "--proc-sys", root)
	w.wants(exitUsage, "no such file", "apply", "--profile", "./absent.conf", "--prove")
	w.wants(exitUsage, "it has no line such as", "apply", "--profile", w.article("# nothing"), "--prove")
	if read(somaxconn) != "4096" || read(datagrams) != "212992" || read("net.core.wmem_default") != "212992" {
		t.Errorf("they are %s, %s", read(somaxconn), read(datagrams))
	}
	if _, err := os.Stat(w.folder); !os.IsNotExist(err) {
		t.Errorf("something is written down: %v", err)
	}
}

// In a namespace, for a finding: what is set is what was measured to help.
func TestTuneApplyProvesAFinding(t *testing.T) {
	w := newWorkshop(t)
	w.fullQueue(w.pod)
	printed, stderr, status := w.tune("apply", "HS-04", "--netns", w.pod, "--prove", "--rounds", "9")
	t.Log(printed)
	if status != exitFindings || !strings.HasPrefix(printed, "keeps: net.core.somaxconn 4096 -> 8192: 4097 -> ") || !strings.HasSuffix(printed, "~ net.core.somaxconn 4096 -> 8192 (namespace pod, accept-queue)\n") || !strings.Contains(stderr, "still seen: HS-04") {
		t.Errorf("exit status %d, %q, %q", status, printed, stderr)
	}
	if w.value(w.pod, somaxconn) != "8192" {
		t.Errorf("it is %s", w.value(w.pod, somaxconn))
	}
	w.wants(exitOK, "- net.core.somaxconn 8192 -> 4096", "undo", "--all")
}

// What goes together is judged together; what cannot be measured is not set, and it is
// said why.
func TestDecide(t *testing.T) {
	proof := func(v bench.Verdict, l bench.Load) *tried {
		p := &bench.Proof{Verdict: v, Load: l, Ratio: &bench.Ratio{Median: 1}}
		return &tried{p, outcomeOf(p)}
	}
	change := func(id, space, setting string) knob.Proposal {
		return knob.Proposal{ID: id, Space: space, Setting: setting, Current: "1", Wanted: "2", Status: knob.Change}
	}
	of := func(setting string) comparison { return comparison{setting, "1", "2"} }
	for _, row := range []struct {
		what  string
		known map[comparison]*tried
		why   map[comparison]error
		want  knob.Status
		says  string
	}{
		{"it helps, and the other goes with it", map[comparison]*tried{of(mostMemory): proof(bench.Keeps, bench.BurstOfDatagrams)}, nil, knob.Change, ""},
		{"nothing is seen", map[comparison]*tried{of(mostMemory): proof(bench.NoEffect, bench.BurstOfDatagrams)}, nil, knob.Enough, "kept as it was: 1.000 [too few rounds]"},
		{"harm alone would be seen", map[comparison]*tried{of(mostMemory): proof(bench.NoEffect, bench.Connections)}, nil, knob.Unknown, "it harms nothing (1.000 [too few rounds]), and no load here shows what it is for: `millrace tune apply socket-buffers`"},
		{"one of two shows nothing", map[comparison]*tried{of(mostMemory): proof(bench.NoEffect, bench.Connections), of(mostSent): proof(bench.NoEffect, bench.BurstOfDatagrams)}, nil, knob.Enough, "kept as it was"},
		{"no load", nil, nil, knob.Unknown, "no load here shows what it does"},
		{"it fails", nil, map[comparison]error{of(mostMemory): errors.New("no room")}, knob.Unknown, "it could not be measured: no room: "},
	} {
		all := []knob.Proposal{change("socket-buffers", "node", mostMemory), change("socket-buffers", "node", mostSent),
			{ID: "socket-buffers", Space: "pod a", Setting: mostMemory, Current: "1", Wanted: "2", Status: knob.Owned, Reason: "theirs"}}
		decide(all, row.known, row.why)
		for _, p := range all[:2] {
			if p.Status != row.want || !strings.Contains(p.Reason, row.says) {
				t.Errorf("%s: %s: %s, %q; want %s, %q", row.what, p.Setting, p.Status, p.Reason, row.want, row.says)
			}
		}
		if all[2].Status != knob.Owned || all[2].Reason != "theirs" {
			t.Errorf("%s: somebody else's is %+v", row.what, all[2])
		}
	}
}
