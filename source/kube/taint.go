package kube

import (
	"context"
	"encoding/json"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// RemoveTaint takes all taints with a key off the Node of the settings, and says whether
// there was one. It changes nothing else of it, and fails if the Node is changed by others
// at the same time, so that one tries again. It asks one server after the other, each
// once. Looking needs the verb list, which the agent has, taking off patch.
func RemoveTaint(ctx context.Context, settings Settings, key string) (was bool, err error) {
	err = askEach(settings, "take the taint "+key+" off Node "+settings.Node, func(at *server) (decided bool, err error) {
		was, err = at.removeTaint(ctx, settings.Node, key)
		return answered(err), err
	})
	return was, err
}

func (s *server) removeTaint(ctx context.Context, node, key string) (removed bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, answerPatience)
	defer cancel()
	found, err := s.node(ctx, node)
	if err != nil {
		return false, err
	}
	patch := withoutTaint(found.Spec.Taints, key)
	if patch == nil {
		return false, nil
	}
	return true, s.client.Patch(types.JSONPatchType).AbsPath("/api/v1/nodes", node).MaxRetries(0).Body(patch).Do(ctx).Error()
}

// step is one of a JSON patch (RFC 6902).
type step struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value,omitempty"`
}

// withoutTaint is the patch that removes a key from taints, which fails if they are
// others by then; nil if it is not there.
func withoutTaint(taints []corev1.Taint, key string) []byte {
	left := slices.DeleteFunc(slices.Clone(taints), func(t corev1.Taint) bool { return t.Key == key })
	if len(left) == len(taints) {
		return nil
	}
	change := step{"replace", "/spec/taints", left}
	if len(left) == 0 {
		change = step{Op: "remove", Path: "/spec/taints"}
	}
	patch, err := json.Marshal([]step{{"test", "/spec/taints", taints}, change})
	if err != nil {
		panic(err) // plain values
	}
	return patch
}
