package cluster

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/millrace/millrace/model"
)

// TestIndexIsAMap does the same to an index and to a map, while both grow and
// shrink, and compares them.
func TestIndexIsAMap(t *testing.T) {
	for seed := range uint64(20) {
		random := rand.New(rand.NewPCG(seed, 0))
		x, want := newIndex(func(o *Object, k model.Name) bool { return o.name == k }), map[model.Name]*Object{}
		for step := range 5000 {
			k := model.Name{Name: fmt.Sprint(random.IntN(1000))}
			if grows := step/1000%2 == 0; random.IntN(10) < 2 == grows {
				x.delete(k)
				delete(want, k)
			} else {
				o := &Object{name: k}
				x.set(k, o)
				want[k] = o
			}
			if x.get(k) != want[k] || x.count != len(want) {
				t.Fatalf("seed %d, step %d: %s is %p of %d and should be %p of %d", seed, step, k, x.get(k), x.count, want[k], len(want))
			}
		}
		for i := range 1000 {
			if k := (model.Name{Name: fmt.Sprint(i)}); x.get(k) != want[k] {
				t.Fatalf("seed %d: in the end %s is %p and should be %p", seed, k, x.get(k), want[k])
			}
		}
	}
}
