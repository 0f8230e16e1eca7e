package pod

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/layertest"
	"github.com/millrace/millrace/layer/pod/cni"
	"github.com/millrace/millrace/layer/pod/pool"
	"github.com/millrace/millrace/model"
)

// nobody is a node with nothing on it.
type nobody struct{}

func (nobody) look() (facts, error)                                 { return facts{mtu: defaultMTU}, nil }
func (nobody) build(*Pod, string, lengths, []netip.Addr) error      { return nil }
func (nobody) spaces() map[netip.Addr]string                        { return nil }
func (nobody) inside(*Pod, string) (lengths, error)                 { return lengths{}, nil }
func (nobody) bandwidth(*Pod, string) (b pool.Bandwidth, err error) { return b, nil }
func (nobody) correct(*Pod, string, lengths) error                  { return nil }
func (nobody) demolish(string) error                                { return nil }
func (nobody) mend(*Pod, []netip.Addr) error                        { return nil }
func (nobody) check(*Pod, string) ([]string, error)                 { return nil, nil }

func TestPureLaws(t *testing.T) {
	layertest.PureLaws(t, layertest.Subject{
		New:       func() layer.Layer { return New(Settings{Node: "n1"}) },
		Snapshots: []*model.Snapshot{cluster("10.244.1.0/24", "fd00:1::/64"), cluster("10.244.1.0/24")},
		Faulty: func(object string) (layer.Layer, func()) {
			l := New(Settings{Node: "n1"})
			l.host = nobody{}
			broken := true
			l.save = func(book pool.Book) error {
				for _, r := range book.Ranges {
					if broken && podRange(r).Object() == object {
						return syscall.ENOSPC
					}
				}
				return nil
			}
			return l, func() { broken = false }
		},
	})
}

func TestLaws(t *testing.T) {
	layertest.Laws(t, func(t *testing.T) layertest.Subject {
		b := newTown(t)
		b.withFolders()
		// two pods that run, of an earlier process
		b.space("web")
		b.space("db")
		l := New(b.settings)
		must(t, l.Open())
		b.apply(l, "10.244.1.0/24", "fd00:1::/64")
		b.add(l, "web")
		db := b.add(l, "db")
		must(t, l.Close())
		if t.Name() == "TestLaws/law_3:_remove_leaves_everything_as_it_was_found" {
			must(t, second(l.Answer(t.Context(), b.request(cni.Del, "web", ""))))
			must(t, second(l.Answer(t.Context(), b.request(cni.Del, "db", ""))))
			_, err := New(b.settings).Remove()
			must(t, err)
		}
		return layertest.Subject{
			New:       func() layer.Layer { return New(b.settings) },
			Snapshots: []*model.Snapshot{cluster("10.244.1.0/24", "fd00:1::/64"), cluster("10.244.9.0/24"), cluster("10.244.1.0/24")},
			Observe:   b.observe,
			Stranger:  b.stranger,
			Works: func() error {
				for _, addr := range db {
					if _, err := say(b.pods["web"], b.pods["db"], addr); err != nil {
						return err
					}
				}
				return nil
			},
		}
	})
}

// stranger has a device whose name is like ours, one with our alias and another's name,
// and routes to them.
func (b *town) stranger() func() error {
	b.t.Helper()
	n, err := link.Open(b.NetNS)
	must(b.t, err)
	b.t.Cleanup(n.Close)
	space := b.space("stranger")
	near, err := n.Veth(link.Veth{Name: "mrstranger", Peer: "a", PeerNamespace: space})
	must(b.t, err)
	other, err := n.Veth(link.Veth{Name: "other", Alias: "millrace c eth0 town shop/x", Peer: "b", PeerNamespace: space})
	must(b.t, err)
	must(b.t, n.Up(near))
	must(b.t, n.Up(other))
	must(b.t, n.Route(link.Route{To: netip.MustParsePrefix("10.99.0.0/24"), Link: near}))
	must(b.t, n.Route(link.Route{To: netip.MustParsePrefix("10.98.0.7/32"), Link: other, Protocol: routeProtocol}))
	file := filepath.Join(filepath.Dir(b.settings.Folder), "stranger")
	must(b.t, os.WriteFile(file, nil, 0o600))
	return func() error {
		_, gone := os.Stat(file)
		_, first := n.Index("mrstranger")
		_, second := n.Index("other")
		routes, err := n.Routes(routeProtocol)
		for _, r := range routes {
			if r.To == netip.MustParsePrefix("10.98.0.7/32") {
				return errors.Join(gone, first, second, err)
			}
		}
		return fmt.Errorf("the route is gone: %w", errors.Join(gone, first, second, err))
	}
}

// A file that was set aside, and one that a crash left half written, are removed, and said.
func TestRemoveTakesEveryFile(t *testing.T) {
	at := Settings{Folder: filepath.Join(t.TempDir(), "pod")}
	must(t, os.Mkdir(at.Folder, 0o700))
	var want []string
	for _, name := range []string{"addresses.json", "addresses.json.unreadable", "addresses.json.next"} {
		must(t, os.WriteFile(filepath.Join(at.Folder, name), nil, 0o600))
		want = append(want, "- file "+filepath.Join(at.Folder, name))
	}
	done, err := New(at).Remove()
	var got []string
	for _, change := range done {
		got = append(got, change.String())
	}
	if want = append(want, "- file "+at.Folder); err != nil || !slices.Equal(got, want) {
		t.Errorf("it removed %q, %v, not %q", got, err, want)
	}
	if _, err := os.Stat(at.Folder); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the folder is still there: %v", err)
	}
}

// Where nothing says otherwise, an address rests for half a minute.
func TestDefaults(t *testing.T) {
	if got := (Settings{}).cooldown(); got != 30*time.Second {
		t.Error(got)
	}
}
