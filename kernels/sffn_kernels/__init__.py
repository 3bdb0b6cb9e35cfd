"""Operations under the structured linears: the formula, a plain-torch implementation and its autograd."""
