package tune

import (
	"testing"

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
