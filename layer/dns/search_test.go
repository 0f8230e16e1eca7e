package dns

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/kernel/resolv"
	"github.com/millrace/millrace/layer"
)

// resolvConf is as kubelet writes it.
func resolvConf(server string, search ...string) string {
	return fmt.Sprintf("search %s\nnameserver %s\noptions ndots:5\n", strings.Join(search, " "), server)
}

// container has a process in the pod that sees a file as its /etc/resolv.conf, until the
// function that it returns is called.
func (h *hamlet) container(file string) (stop func()) {
	h.t.Helper()
	for _, tool := range []string{"unshare", "mount"} {
		if _, err := exec.LookPath(tool); err != nil {
			h.t.Skipf("needs %s", tool)
		}
	}
	c := exec.Command("unshare", "--mount", "sh", "-c", `mount --bind "$0" /etc/resolv.conf && echo there && exec cat`, file)
	in, err := c.StdinPipe()
	must(h.t, err)
	out, err := c.StdoutPipe()
	must(h.t, err)
	must(h.t, netns.Do(h.pod, c.Start))
	_, err = io.ReadFull(out, make([]byte, 1))
	must(h.t, err)
	stop = sync.OnceFunc(func() {
		in.Close()
		_ = c.Wait()
	})
	h.t.Cleanup(stop)
	return stop
}

// agent does for a layer what the agent does, until the test ends or the function that it
// returns is called.
func (h *hamlet) agent(l *Layer) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	changed := make(chan struct{}, 1)
	var both sync.WaitGroup
	both.Go(func() {
		_ = l.Watch(ctx, func() {
			select {
			case changed <- struct{}{}:
			default:
			}
		})
	})
	var have layer.Picture
	both.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-changed:
			}
			var err error
			if have == nil {
				have, err = l.Read()
			} else {
				have, err = l.Refresh(have)
			}
			want := l.Plan(town())
			if err == nil {
				have, _, err = l.Apply(have, want, l.Diff(have, want, true))
			}
			if err != nil {
				h.t.Error(err)
			}
		}
	})
	stop = sync.OnceFunc(func() { cancel(); both.Wait() })
	h.t.Cleanup(stop)
	return stop
}

// A pod's search list is known while all its containers have the same, and ask the DNS
// Service first.
func TestSearchListOfAPod(t *testing.T) {
	h := newHamlet(t)
	l := h.open()
	l.files.every, l.files.first = 20*time.Millisecond, 10*time.Millisecond
	h.agent(l)
	shows := func(what, want string) {
		t.Helper()
		for begun := time.Now(); ; time.Sleep(5 * time.Millisecond) {
			picture, err := New(h.settings).Look()
			must(t, err)
			var text []string
			for _, list := range picture.(*Picture).Searches() {
				text = append(text, list.Object()+" "+list.Detail())
			}
			got := strings.Join(text, "\n")
			if got == want {
				return
			}
			if time.Since(begun) > 20*time.Second {
				t.Fatalf("%s: the kernel has %q, not %q", what, got, want)
			}
		}
	}
	degraded := func(want string) {
		t.Helper()
		for begun := time.Now(); ; time.Sleep(5 * time.Millisecond) {
			d, err := l.Describe()
			must(t, err)
			text := strings.Join(d.Degraded, "\n")
			if strings.Contains(text, want) && (want != "" || !strings.Contains(text, "search list")) {
				return
			}
			if time.Since(begun) > 20*time.Second {
				t.Fatalf("the layer says %q, not %q", text, want)
			}
		}
	}
	const known = "search list of pod1 -> shop.svc.cluster.local svc.cluster.local cluster.local example.com, ndots 5"
	file, other := filepath.Join(t.TempDir(), "resolv.conf"), filepath.Join(t.TempDir(), "resolv.conf")
	write := func(path, text string) { t.Helper(); must(t, os.WriteFile(path, []byte(text), 0o644)) }
	ofKubelet := resolvConf("10.96.0.10", "shop.svc.cluster.local", "svc.cluster.local", "cluster.local", "example.com")

	write(file, ofKubelet)
	h.container(file)
	shows("a container", known)
	write(other, resolvConf("10.96.0.10", "svc.cluster.local"))
	stop := h.container(other)
	shows("a container with another list", "")
	degraded("pod1: containers have different ones")
	stop()
	shows("it has ended", known)
	degraded("")
	write(file, resolvConf("192.0.2.53", "shop.svc.cluster.local"))
	shows("it asks another server", "")
	write(file, resolvConf("10.96.0.10", "a", "b", "c", "d", "e", "f", "g", "h", "i"))
	degraded("pod1: it has more than 8 entries")
	write(file, resolvConf("fd00:96::a", "Example.COM."))
	shows("over IPv6, in upper case", "search list of pod1 -> example.com, ndots 5")
	write(file, ofKubelet)
	shows("as before", known)

	node, err := link.Open(h.NetNS)
	must(t, err)
	defer node.Close()
	must(t, node.Delete("pod1"))
	shows("the pod's device is gone", "")
}

// A short name costs a pod two queries, one for each family, whatever its search list does with
// it: the list was read from the pod's own file.
func TestShortNamesCostTwoQueries(t *testing.T) {
	h := newHamlet(t)
	h.serve() // for what is not known here
	l := h.open()
	l.files.every, l.files.first = 20*time.Millisecond, 10*time.Millisecond
	queries := func(name, want string) (n int) {
		t.Helper()
		before, err := l.Describe()
		must(t, err)
		if got := h.resolve("getent", dns4.Addr(), name); got != want {
			t.Errorf("%s is %q, not %q", name, got, want)
		}
		after, err := l.Describe()
		must(t, err)
		for reason, count := range after.Reasons {
			n += int(count - before.Reasons[reason])
		}
		return n
	}
	names := map[string]string{"kube-dns.kube-system": "10.96.0.10 fd00:96::a", "web.shop.svc": "10.96.0.20 fd00:96::20"}
	alone := map[string]int{}
	for name, want := range names {
		alone[name] = queries(name, want)
	}
	file := filepath.Join(t.TempDir(), "resolv.conf")
	must(t, os.WriteFile(file, []byte(resolvConf("10.96.0.10", "shop.svc.cluster.local", "svc.cluster.local", "cluster.local")), 0o644))
	h.container(file)
	stop := h.agent(l)
	for begun := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		picture, err := New(h.settings).Look()
		must(t, err)
		if len(picture.(*Picture).Searches()) == 1 {
			break
		}
		if time.Since(begun) > 20*time.Second {
			t.Fatal("the pod's list is not known")
		}
	}
	stop() // it would see getent before that sees the pod's file
	for name, want := range names {
		n := queries(name, want)
		t.Logf("%s: %d queries, %d where the list is not known", name, n, alone[name])
		if n != 2 || alone[name] < 4 {
			t.Errorf("%s takes %d queries, and %d where the list is not known", name, n, alone[name])
		}
	}
}

// What a predecessor wrote stays in force until the pods were looked at.
func TestSearchListsAreTakenOver(t *testing.T) {
	h := newHamlet(t)
	l := h.open()
	file := filepath.Join(t.TempDir(), "resolv.conf")
	must(t, os.WriteFile(file, []byte(resolvConf("10.96.0.10", "shop.svc.cluster.local")), 0o644))
	h.container(file)
	apply := func(l *Layer, look bool) layer.Changes {
		t.Helper()
		_, err := l.Read()
		must(t, err)
		if look {
			l.files.look(new(resolv.Reader), h.settings.Netns)
		}
		return h.apply(l)
	}
	if changes := apply(l, true); len(changes) != 1 || changes[0].String() != "+ search list of pod1 -> shop.svc.cluster.local, ndots 5" {
		t.Fatalf("the changes are\n%v", changes)
	}
	l.Close()
	l = New(h.settings)
	must(t, l.Open())
	defer l.Close()
	for _, look := range []bool{false, true} {
		if changes := apply(l, look); len(changes) > 0 {
			t.Errorf("a new process, looked %v:\n%v", look, changes)
		}
	}
}
