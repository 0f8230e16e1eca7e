package link

import (
	"testing"
	"time"
)

// A bucket is read as it was made, at the rates that Kubernetes takes, and can be made
// another one.
func TestTokenBucket(t *testing.T) {
	_, n := namespace(t, "node")
	pod, _ := namespace(t, "pod")
	near, err := n.Veth(Veth{Name: "near", Peer: "far", PeerNamespace: pod})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []TokenBucket{
		{Rate: 125, Burst: 13 * time.Second, Limit: 30_000},
		{Rate: 125_000_000, Burst: 20 * time.Millisecond, Limit: 1 << 20},
		{Rate: 125_000_000_000_000, Burst: 20 * time.Millisecond, Limit: 1 << 31},
	} {
		for range 2 {
			if err := n.SetTokenBucket(near, want); err != nil {
				t.Fatal(err)
			}
			all, err := n.Qdiscs()
			if got := all[near]; err != nil || got.Kind != "tbf" || got.Bucket != want {
				t.Errorf("%+v, %v, not %+v", got, err, want)
			}
		}
	}
	if err := n.SetTokenBucket(99, TokenBucket{Rate: 125, Limit: 1}); err == nil {
		t.Error("a link that there is not was limited")
	}
}
