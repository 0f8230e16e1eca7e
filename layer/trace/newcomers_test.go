package trace

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer/trace/cause"
)

// Namespaces that come while it is watched are read: at the end those that are there
// still, and those that have gone again as they were when something happened in them.
func TestNamespacesThatCome(t *testing.T) {
	w := newTown(t)
	folder := t.TempDir()
	stays, goes := filepath.Join(folder, "stays"), filepath.Join(folder, "goes")
	reader, err := NewReader([]Namespace{{Name: "client", Path: w.client}, {Name: "server", Path: w.server}})
	w.must(err)
	w.must(reader.Before(t.Context()))
	newcomers := reader.Newcomers(func() (all []Namespace, err error) {
		for _, path := range []string{w.client, stays, goes} {
			var file unix.Stat_t
			if unix.Stat(path, &file) == nil {
				all = append(all, Namespace{Name: filepath.Base(path), Path: path, Inode: uint32(file.Ino)})
			}
		}
		return all, nil
	})
	s, err := Watch(Options{Met: newcomers.Met, Calls: true})
	w.must(err)
	newcomers.Follow(t.Context())
	swallowed := func(path, net16 string) {
		w.must(netns.Create(path))
		t.Cleanup(func() { netns.Remove(path) })
		in(t, path, "ip", "route", "add", "blackhole", net16+".0.0/16")
		w.in(path, func() error {
			_, err := net.Dial("udp", net16+".1.1:80")
			if !errors.Is(err, unix.EINVAL) {
				return fmt.Errorf("a call into a black hole: %v", err)
			}
			return nil
		})
	}
	swallowed(goes, "10.98")
	inode := w.inode(goes)
	for patience := time.Now().Add(20 * time.Second); !s.has(cause.CallFailed, inode) && time.Now().Before(patience); {
		time.Sleep(10 * time.Millisecond)
	}
	newcomers.Stop() // it has been read now
	w.must(netns.Remove(goes))
	swallowed(stays, "10.99")
	r, err := s.Stop()
	w.must(err)
	e, err := reader.After(t.Context(), time.Second, r.Events)
	w.must(err)
	said := map[string]string{}
	for _, v := range cause.Diagnose(e) {
		said[v.Where.Namespace] += v.Cause + ": " + v.Title + "; "
	}
	for name, route := range map[string]string{"stays": "10.99.0.0/16", "goes (gone)": "10.98.0.0/16"} {
		if !strings.HasPrefix(said[name], "route-blackhole: ") || !strings.Contains(said[name], route) {
			t.Errorf("%s: %q, not the route to %s that swallows", name, said[name], route)
		}
	}
	if names := reader.Namespaces(); len(names) != 3 || names[2].Name != "stays" {
		t.Errorf("%+v", names)
	}
}

// has says whether an example of an event in a namespace has come.
func (s *Session) has(kind cause.Kind, inode uint32) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for key := range s.examples {
		if kinds[traceKind(key.Kind)] == kind && key.Netns == inode {
			return true
		}
	}
	return false
}

// Events of a namespace that has gone are not those of the one that has its inode now.
func TestEventsGoWithTheCookie(t *testing.T) {
	w := newTown(t)
	inode := w.inode(w.client)
	cookie, err := netns.Cookie(w.client)
	if err != nil {
		t.Skip(err)
	}
	r, err := NewReader([]Namespace{{Name: "client", Path: w.client}})
	w.must(err)
	w.must(r.Before(t.Context()))
	e, err := r.After(t.Context(), time.Second, []cause.Event{
		{Kind: cause.Drop, Space: inode, Cookie: uint32(cookie), Count: 2},
		{Kind: cause.Drop, Space: inode, Cookie: uint32(cookie) + 1, Count: 7},
	})
	w.must(err)
	if e.Events[0].Space != inode || e.Events[1].Space == inode {
		t.Errorf("%+v", e.Events)
	}
	if len(e.Missing) != 1 || !strings.HasPrefix(e.Missing[0], "why 7 packets died, and 0 other events, in 1 network namespaces") {
		t.Errorf("missing: %q", e.Missing)
	}
}
