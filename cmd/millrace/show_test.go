package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer/trace"
	"github.com/millrace/millrace/model"
)

// counted is a ward on which the programs of an agent count; it is asked with these
// arguments.
func counted(t *testing.T) (w *ward, args []string) {
	w = newWard(t)
	folder := t.TempDir()
	w.must(unix.Mount("bpf", folder, "bpf", 0, "mode=0700"))
	t.Cleanup(func() { unix.Unmount(folder, unix.MNT_DETACH) })
	l := trace.New(trace.Settings{Pins: filepath.Join(folder, "trace"), Whole: true})
	w.must(l.Open())
	have, err := l.Read()
	w.must(err)
	want := l.Plan(&model.Snapshot{Complete: true})
	_, _, err = l.Apply(have, want, l.Diff(have, want, true))
	w.must(err)
	w.must(l.Close()) // the programs stay
	manifest := filepath.Join(t.TempDir(), "web.yaml")
	write(t, manifest, "apiVersion: v1\nkind: Pod\nmetadata: {name: web-0, namespace: shop}\n"+
		"spec: {containers: [{name: c, image: x}]}\nstatus: {phase: Running, podIP: "+wardPod+"}\n")
	for _, space := range []string{w.node, w.pod} { // a namespace is found by a process in it
		sleeper := exec.Command("sleep", "600")
		w.must(netns.Do(space, sleeper.Start))
		t.Cleanup(func() { sleeper.Process.Kill(); sleeper.Wait() })
	}
	return w, []string{"--pins", folder, "--run", t.TempDir(), "--source", "dir:" + manifest}
}

// What died while nobody looked is there, by the pod's name, with examples of it.
func TestShowDrops(t *testing.T) {
	w, args := counted(t)
	w.refused(81)
	stdout, stderr, status := millrace(t, append([]string{"show", "drops", "-o", "json"}, args...)...)
	var r dropReport
	if err := json.Unmarshal([]byte(stdout), &r); err != nil || status != exitOK || !r.Always {
		t.Fatalf("exit status %d, %v: %s %s", status, err, stdout, stderr)
	}
	mine := func(d drop) bool {
		return d.Pod == "shop/web-0" && d.Reason == "NO_SOCKET" && d.Function == "tcp_v4_rcv" && d.Device == "eth0" &&
			d.Destination.String() == wardPod+":81" && d.DestinationName == "pod shop/web-0"
	}
	at := slices.IndexFunc(r.Examples, mine)
	if !slices.ContainsFunc(r.Drops, mine) || at < 0 {
		t.Fatalf("%s", stdout)
	}
	if e := r.Examples[at]; e.Flags != "SYN" || len(e.Stack) == 0 || e.Length < 40 {
		t.Errorf("the example: %+v", e)
	}
	text, _, _ := millrace(t, append([]string{"show", "drops"}, args...)...)
	for _, part := range []string{"pod shop/web-0", "NO_SOCKET", "last examples:", "called by"} {
		if !strings.Contains(text, part) {
			t.Errorf("no %q in\n%s", part, text)
		}
	}
}

// Who watches is told what dies, second by second, and nothing of before.
func TestShowDropsLive(t *testing.T) {
	w, args := counted(t)
	w.refused(81)
	c := product(append([]string{"show", "drops", "live", "-o", "json"}, args...)...)
	out, err := c.StdoutPipe()
	w.must(err)
	w.must(c.Start())
	defer func() { c.Process.Kill(); c.Wait() }()
	lines := make(chan string)
	go func() {
		for s := bufio.NewScanner(out); s.Scan(); {
			lines <- s.Text()
		}
		close(lines)
	}()
	patience, again := time.After(30*time.Second), time.NewTicker(200*time.Millisecond)
	for {
		select {
		case line := <-lines:
			var r dropReport
			w.must(json.Unmarshal([]byte(line), &r))
			for _, d := range r.Drops {
				if d.Destination.String() == wardPod+":81" {
					t.Errorf("what died before is told: %s", line)
				}
				if d.Destination.String() == wardPod+":82" && d.Pod == "shop/web-0" && d.Count > 0 {
					w.must(c.Process.Signal(syscall.SIGINT))
					return
				}
			}
		case <-again.C:
			w.refused(82)
		case <-patience:
			t.Fatal("nothing was told")
		}
	}
}

// Connections are told with how they do, also those that are over.
func TestShowFlows(t *testing.T) {
	w, args := counted(t)
	var listener net.Listener
	w.must(netns.Do(w.pod, func() (err error) { listener, err = net.Listen("tcp", wardPod+":80"); return err }))
	defer listener.Close()
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(c, c); c.Close() }()
		}
	}()
	say := func() net.Conn {
		var c net.Conn
		w.must(netns.Do(w.node, func() (err error) { c, err = net.Dial("tcp", wardPod+":80"); return err }))
		_, err := c.Write(make([]byte, 5000))
		w.must(err)
		_, err = io.ReadFull(c, make([]byte, 5000))
		w.must(err)
		return c
	}
	say().Close()
	defer say().Close()
	w.refused(81)
	read := func() *flowReport {
		stdout, stderr, status := millrace(t, append([]string{"show", "flows", "-o", "json"}, args...)...)
		r := &flowReport{}
		if err := json.Unmarshal([]byte(stdout), r); err != nil || status != exitOK || !r.Ended {
			t.Fatalf("exit status %d, %v: %s %s", status, err, stdout, stderr)
		}
		return r
	}
	find := func(r *flowReport, port int) *flowSum {
		for _, f := range r.Flows {
			// both ends of it are listed
			if f.Client.String() == wardNode && f.Server.String() == fmt.Sprintf("%s:%d", wardPod, port) && f.ServerName == "pod shop/web-0" && f.Sent >= 5000*uint64(min(1, 81-port)) {
				return f
			}
		}
		return &flowSum{}
	}
	var r *flowReport
	for patience := time.Now().Add(20 * time.Second); time.Now().Before(patience); time.Sleep(50 * time.Millisecond) {
		if r = read(); find(r, 80).Ended == 1 {
			break
		}
	}
	if f := find(r, 80); f.Verdict != "ok" || f.Connections != 1 || f.Ended != 1 || f.Sent < 10_000 || f.Received < 10_000 || f.Longest == 0 {
		t.Errorf("port 80: %+v", f)
	}
	if f := find(r, 81); f.Verdict != "refused" || f.Refused != 1 || f.Connections != 0 {
		t.Errorf("port 81: %+v", f)
	}
}

// The verdict is of what is open, and of most of what has ended.
func TestVerdictOfFlows(t *testing.T) {
	for _, row := range []struct {
		f    flowSum
		want string
	}{
		{flowSum{Connections: 3}, "ok"},
		{flowSum{Ended: 100, Refused: 10}, "ok"},
		{flowSum{Ended: 3, Refused: 2}, "refused"},
		{flowSum{Ended: 3, Refused: 2, dropped: "NO_SOCKET"}, "refused"},
		{flowSum{Connections: 2, Opening: 2}, "unanswered"},
		{flowSum{Connections: 2, Opening: 2, dropped: "NETFILTER_DROP"}, "dropped NETFILTER_DROP"},
		{flowSum{Connections: 2, Stalled: 1}, "retransmitting"},
		{flowSum{Connections: 2, Stalled: 1, dropped: "PKT_TOO_BIG"}, "dropped PKT_TOO_BIG"},
		{flowSum{Connections: 2, dropped: "TCP_CSUM"}, "ok"},
		{flowSum{Ended: 2, Unanswered: 2}, "unanswered"},
		{flowSum{Ended: 2, Reset: 2}, "reset"},
	} {
		if got := row.f.verdict(); got != row.want {
			t.Errorf("%+v: %s, not %s", row.f, got, row.want)
		}
	}
}
