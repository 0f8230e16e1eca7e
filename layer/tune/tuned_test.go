package tune

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// What a tuned has in force is read from its profiles, and from those that they include.
func TestTuned(t *testing.T) {
	root := t.TempDir()
	for name, text := range map[string]string{
		"etc/tuned/active_profile":                              "mine\n",
		"etc/tuned/mine/tuned.conf":                             "[main]\ninclude=throughput-performance\n[sysctl]\n# net.core.rmem_max=1\nnet.core.somaxconn = 2048\nnet.core.wmem_max=>1000\n",
		"usr/lib/tuned/throughput-performance/tuned.conf":       "[main]\ninclude=mine\n[vm]\nnet.core.rmem_default=1\n[sysctl]\nnet.ipv4.tcp_rmem=\"4096 131072 16777216\"\n",
		"usr/lib/tuned/mine/tuned.conf":                         "[sysctl]\nnet.core.somaxconn = 7\n",
		"usr/lib/tuned/profiles/latency-performance/tuned.conf": "[sysctl]\nnet.core.busy_read=50\n",
	} {
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	got := tunedBelow(root)
	if len(got) != 2 || len(got[queueLength]) != 1 || got[queueLength][0] != [2]string{"/etc/tuned/mine/tuned.conf of tuned", "2048"} ||
		got["net.ipv4.tcp_rmem"][0][1] != "4096 131072 16777216" {
		t.Errorf("%q", got)
	}
	if got := tunedBelow(t.TempDir()); len(got) > 0 {
		t.Errorf("without a tuned: %q", got)
	}
}
