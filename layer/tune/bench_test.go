package tune

import (
	"testing"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/kernel/sysctl"
)

func BenchmarkRead(b *testing.B) {
	l := New(Settings{Conntrack: everything, From: "x", CPUs: 2, Tree: sysctl.Tree{Root: "/proc/sys"}, Folder: b.TempDir()})
	for b.Loop() {
		if _, err := l.Read(); err != nil {
			b.Fatal(err)
		}
	}
}

// One namespace, as `millrace tune` looks at it.
func BenchmarkLook(b *testing.B) {
	cookie, err := netns.Cookie("")
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := Look(b.Context(), "/proc/sys", []Place{{Name: "node", Cookie: cookie}}, 0); err != nil {
			b.Fatal(err)
		}
	}
}
