package trace

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/layertest"
	"github.com/millrace/millrace/layer/trace/cause"
	"github.com/millrace/millrace/model"
)

var snapshots = []*model.Snapshot{{Complete: true}, {Complete: true, Number: 2}}

func TestPureLaws(t *testing.T) {
	folder := func() string { return filepath.Join(t.TempDir(), "trace") }
	layertest.PureLaws(t, layertest.Subject{
		New:       func() layer.Layer { return New(Settings{Pins: folder(), Whole: true}) },
		Snapshots: snapshots,
		Nothing:   func() layer.Picture { return &Picture{} },
		Faulty: func(object string) (layer.Layer, func()) {
			l, broken := New(Settings{Pins: folder(), Whole: true}), true
			l.attach = func(p probe) error {
				if broken && "signal "+p.tracepoint == object {
					return errors.New("no")
				}
				return nil
			}
			return l, func() { broken = false }
		},
	})
}

func TestLaws(t *testing.T) {
	layertest.Laws(t, func(t *testing.T) layertest.Subject {
		bed := layertest.NewBed(t)
		pins := filepath.Join(bed.BPF, "millrace", "trace")
		if err := os.MkdirAll(filepath.Dir(pins), 0o700); err != nil {
			t.Fatal(err)
		}
		settings := Settings{Pins: pins, Whole: true}
		return layertest.Subject{
			New:       func() layer.Layer { return New(settings) },
			Snapshots: snapshots,
			Observe: func() (text string) {
				_ = filepath.WalkDir(bed.BPF, func(path string, _ os.DirEntry, _ error) error {
					text += path + "\n"
					return nil
				})
				return text
			},
			Stranger: func() func() error {
				theirs := filepath.Join(filepath.Dir(pins), "service")
				if err := os.Mkdir(theirs, 0o700); err != nil {
					t.Fatal(err)
				}
				return func() error { _, err := os.Stat(theirs); return err }
			},
			// Every packet that dies is counted, and nobody forgets it.
			Works: func() error {
				before, err := New(settings).Counted()
				if err != nil {
					return err
				}
				if err := bed.Inside(func() error { ask("udp", "127.0.0.1:9", 0); return nil }); err != nil {
					return err
				}
				after, err := New(settings).Counted()
				if err != nil {
					return err
				}
				if noSocket(after) <= noSocket(before) {
					return fmt.Errorf("a packet died and was not counted: %d before, %d after", noSocket(before), noSocket(after))
				}
				return nil
			},
		}
	})
}

func noSocket(r *Recording) (n uint64) {
	for _, t := range r.Totals {
		if t.Kind == cause.Drop && t.Reason == "NO_SOCKET" {
			n += t.Count
		}
	}
	return n
}

func TestDescribe(t *testing.T) {
	bed := layertest.NewBed(t)
	l := New(Settings{Pins: filepath.Join(bed.BPF, "trace"), Whole: true})
	if err := l.Open(); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	have, err := l.Read()
	if err != nil {
		t.Fatal(err)
	}
	want := l.Plan(snapshots[0])
	for range mostTries {
		if have, _, err = l.Apply(have, want, l.Diff(have, want, true)); err != nil {
			t.Fatal(err)
		}
	}
	if left := l.Diff(have, want, true); len(left) > 0 {
		t.Errorf("still to do: %v", left)
	}
	if err := bed.Inside(func() error { ask("udp", "127.0.0.1:9", 0); return nil }); err != nil {
		t.Fatal(err)
	}
	d, err := l.Describe()
	if err != nil {
		t.Fatal(err)
	}
	if d.Reasons["drop NO_SOCKET"] == 0 || len(d.Programs)+len(d.Degraded) != want.Len() || len(d.Programs) == 0 || len(d.Maps) != len(pinnedMaps) ||
		d.Maps[0].Entries == 0 || d.Maps[0].Bytes == 0 {
		t.Errorf("%+v", d)
	}
	var file unix.Stat_t
	if err := unix.Stat(bed.NetNS, &file); err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(d.Drops, func(o layer.Drops) bool {
		return o.Space == uint32(file.Ino) && o.Reason == "NO_SOCKET" && o.Count > 0
	}) {
		t.Errorf("nothing died in namespace %d: %+v", file.Ino, d.Drops)
	}
	for _, missing := range d.Degraded {
		if !strings.Contains(missing, "no such tracepoint") {
			t.Error(missing)
		}
	}
}
